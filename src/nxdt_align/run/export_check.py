"""Whether an export says what the trainer says: log-probabilities of a few records, by transformers."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
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

log = logging.getLogger(__name__)

RECORDS = 3
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
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > LARGEST:
        log.log(
            NOTICE,
            "the export is not read again to compare it with the trainer: %.0f GB, more than %.0f GB",
            *(size / 1e9, LARGEST / 1e9),
        )
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
