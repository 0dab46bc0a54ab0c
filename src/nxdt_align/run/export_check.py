"""Whether an export says what the trainer says: log-probabilities of a few records, by transformers."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from nxdt_align.batch import SlotRole
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.tokenize import Example
from nxdt_align.engines.base import Engine
from nxdt_align.errors import UserError
from nxdt_align.evaluation.transformers_model import TransformersModel
from nxdt_align.messages import NOTICE
from nxdt_align.models.adapters import Switch, add_adapters, use_trained
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.training.hooks import PREFLIGHT_TOLERANCE
from nxdt_align.weights.peft import AdaptedWeights, MergedWeights

log = logging.getLogger(__name__)

RECORDS = 3
TOKENS = 33
"""Of the text that a merged folder is compared on."""
LARGEST = 20_000_000_000
"""Bytes of weights up to which an export is loaded again, in the memory of rank 0's host."""


class Examples(Protocol):
    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Value:
    """The trainer's log-probability of one response."""

    record: int
    """Its index among the training data's examples."""
    response: int
    logp: float
    """Sum over the response's tokens, nats."""


def trainer_values(engine: Engine, data: ModelAlignmentDataModule) -> list[Value]:
    """Of the first records of this rank's share of a step. Collective."""
    found: list[Value] = []
    for batch in data.first_micro_batches()[:RECORDS]:
        # Every response token counts 1 here, whatever it weighs in the loss.
        whole = dataclasses.replace(batch, token_weights=None)
        values = engine.response_logps(whole.to(engine.device)).cpu()
        for row, slot in batch.slot_valid.nonzero().tolist():
            is_second = int(batch.slot_role[row, slot]) in (SlotRole.REJECTED, SlotRole.KL)
            record = int(batch.record_index[row, slot])
            found.append(Value(record, int(is_second), float(values[row, slot])))
    kept = list(dict.fromkeys(value.record for value in found))[:RECORDS]
    return [value for value in found if value.record in kept]


def check_export(
    folder: Path,
    values: Sequence[Value],
    examples: Examples,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Compare the export's log-probabilities, computed in ``dtype`` on the CPU, with the trainer's.

    Raises UserError, and removes the export, where they differ by more than ``tolerance`` nats per token:
    then rewards would, too.
    """
    if not _is_read_again(folder, "the trainer"):
        return
    model = TransformersModel(folder, torch.device("cpu"), dtype)
    worst = 0.0
    for value in values:
        example = examples[value.record]
        response = example.responses[value.response].tolist()
        own = model.logp(example.prompt.tolist(), response)
        worst = max(worst, abs(own - value.logp) / len(response))
        if not worst <= tolerance:  # NaN is no agreement
            shutil.rmtree(folder)
            raise UserError(
                f"the export {folder} differs from the trainer by {worst:.3g} nats per token on record "
                f"{example.record_id} (tolerance {tolerance:g}) and was removed: nxdt-align export makes one "
                "of the newest checkpoint; exp_manager.check_export=False keeps it unchecked"
            )
    log.info(
        "export: transformers' log-probabilities of %d responses are the trainer's to %.2g nats per token, "
        "and so are rewards",
        *(len(values), worst),
    )


def check_merged(
    folder: Path, weights: MergedWeights, config: DecoderConfig, stored: torch.dtype | None
) -> None:
    """Compare a merged folder, by transformers, with base and adapter apart, by this package's decoder: the
    log-probability of a fixed text. On the CPU, one after the other, in float32 where that is no more than
    LARGEST.

    Args:
        stored: the dtype that was asked for; None: the base's.

    Raises UserError, and removes the folder, where they differ by more than what its dtype explains.
    """
    if not _is_read_again(folder, "base and adapter apart"):
        return
    dtypes = {stored} if stored is not None else {weights.dtype(name) for name in weights.names()}
    coarsest = max(dtypes, key=lambda dtype: PREFLIGHT_TOLERANCE.get(dtype, 0.0))
    count = sum(prod(weights.shape(name)) for name in weights.names())
    computed = torch.float32 if 4 * count <= LARGEST else coarsest
    tolerance = PREFLIGHT_TOLERANCE.get(coarsest, PREFLIGHT_TOLERANCE[torch.float32])
    text = [(1 + 7919 * i) % config.vocab_size for i in range(TOKENS)]
    want = _apart(weights, config, text, computed)
    got = TransformersModel(folder, torch.device("cpu"), computed).logp(text[:1], text[1:])
    difference = abs(got - want) / (TOKENS - 1)
    if not difference <= tolerance:  # NaN is no agreement
        shutil.rmtree(folder)
        raise UserError(
            f"the merged folder {folder} differs from base and adapter apart by {difference:.3g} nats per "
            f"token (tolerance {tolerance:g}) and was removed; --no-verify keeps it unchecked"
        )
    said = "transformers' log-probabilities of the merged folder are those of base and adapter to %.2g nats"
    log.info(f"{said} per token", difference)


@torch.inference_mode()
def _apart(weights: MergedWeights, config: DecoderConfig, text: Sequence[int], dtype: torch.dtype) -> float:
    """Log-probability of ``text`` behind its first token, nats, with the adapter's terms beside the base."""
    adapter, switch, attention = weights.adapter, Switch(), DenseAttention()
    spec = dataclasses.replace(adapter.spec, from_adapter=False, quantize=None)
    with torch.device("meta"):
        decoder = Decoder(config, attention)
        add_adapters(decoder, spec, switch)
    decoder.to(dtype).to_empty(device="cpu")
    decoder.fill_buffers()
    source = AdaptedWeights(weights.base, config, spec, 0, adapter)
    for name, parameter in decoder.named_parameters():
        parameter.copy_(source.read(name))
    use_trained(decoder, spec, switch)
    ids = torch.tensor([text])
    places = torch.arange(len(text) - 1)[None]
    context = decoder.prepare(
        torch.zeros_like(places, dtype=torch.int32), (places + 1).int(), attention.prepare
    )
    logits = decoder.logits(decoder(ids[:, :-1], places, context)).float()
    return float(logits.log_softmax(-1).gather(2, ids[:, 1:, None]).double().sum())


def _is_read_again(folder: Path, other: str) -> bool:
    """Whether ``folder`` is small enough."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > LARGEST:
        log.log(
            NOTICE,
            "the export is not read again to compare it with %s: %.0f GB, more than %.0f GB",
            *(other, size / 1e9, LARGEST / 1e9),
        )
    return size <= LARGEST
