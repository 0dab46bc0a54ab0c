"""A run's adapters: which, what they start from, what a checkpoint says of them, and their export."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.config.schema import Config
from nxdt_align.engines.native import checkpoint as native_checkpoint
from nxdt_align.engines.native.checkpoint import NativeCheckpoint
from nxdt_align.engines.nxd import checkpoint as nxd_checkpoint
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.models.adapters import AdapterSpec, is_adapter
from nxdt_align.models.partition import Partition
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.named_tensors import WeightSource
from nxdt_align.planning.workload import adapters_of
from nxdt_align.run.resume import RUN_RECORD
from nxdt_align.weights.detect import fresh_weights
from nxdt_align.weights.hf import FreshWeights
from nxdt_align.weights.nxdt_adapters import ShardedAdapter
from nxdt_align.weights.peft import (
    AdaptedWeights,
    Adapter,
    MergedWeights,
    require_peft_names,
    write_peft_folder,
)

log = logging.getLogger(__name__)

RECORD = "adapters"
"""Key of what a checkpoint's record says of its adapters."""
_OF_START = {
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "rslora": "rslora",
    "dora": "dora",
}
"""Key of the configuration -> what an adapter that training starts from settles."""


def spec_of(config: Config, model: ModelShape, start: WeightSource | None = None) -> AdapterSpec | None:
    """The adapters of a run; None where every weight is trained.

    Args:
        start: what training starts from; an adapter settles rank, scale and layers. None: those of the
            configuration, for a check before weights are looked at.

    Raises UserError where they do not fit the model, or the configuration says otherwise than the adapter
    that it starts from.
    """
    peft = config.model_alignment_strategy.peft
    if peft is None:
        return None
    if peft.quantize_base is not None and not isinstance(model, DecoderConfig):
        raise UserError(
            f"model_alignment_strategy.peft.quantize_base: must not be set for a {model.model_type} that "
            "transformers computes: a base in 4 bits is of this package's own families; leave it out, and "
            "LoRA, rsLoRA and DoRA train beside a base as it is, which distributed_strategy.fsdp: True "
            "divides over all ranks"
        )
    spec = adapters_of(config, model)
    assert spec is not None
    if isinstance(start, MergedWeights):
        spec = _settled(config, spec, start)
    if config.exports_adapter:
        # Now, and not once the training is done.
        require_peft_names(model, spec, "exp_manager.export_hf: adapter")
    return spec


def _settled(config: Config, spec: AdapterSpec, start: MergedWeights) -> AdapterSpec:
    """That of the adapter that training starts from. Raises UserError where the configuration says
    otherwise."""
    given = start.adapter.spec
    for key, field in _OF_START.items():
        path = f"model_alignment_strategy.peft.{key}"
        if path in config.given and getattr(spec, field) != getattr(given, field):
            raise UserError(
                f"{path}: must be {getattr(given, field)}, as in the adapter that exp_manager."
                f"resume_from_checkpoint names ({start.adapter.path}), but is {getattr(spec, field)}; leave "
                "it out"
            )
    for key, field in (("target_modules", "targets"), ("modules_to_save", "saved")):
        path = f"model_alignment_strategy.peft.{key}"
        if path in config.given and set(getattr(spec, field)) != set(getattr(given, field)):
            raise UserError(
                f"{path}: must name the layers of the adapter that exp_manager.resume_from_checkpoint names "
                f"({start.adapter.path}); leave it out, and they are taken from there"
            )
    return dataclasses.replace(given, dropout=spec.dropout, from_adapter=True, quantize=spec.quantize)


def adapted(config: Config, model: ModelShape, start: WeightSource) -> WeightSource:
    """What the engine is filled from: ``start`` itself where every weight is trained."""
    spec = spec_of(config, model, start)
    if spec is None:
        return start
    if isinstance(start, MergedWeights):
        return AdaptedWeights(start.base, model, spec, config.seed, start.adapter)
    return AdaptedWeights(start, model, spec, config.seed)


def say(config: Config, spec: AdapterSpec, start: WeightSource, *, has_reference: bool) -> None:
    """What is trained, and what the reference is."""
    whole = f", {len(spec.saved)} modules whole" if spec.saved else ""
    kind = "DoRA" if spec.dora else "rsLoRA" if spec.rslora else "LoRA"
    base = "the base stays as it is" + (f", in 4 bits ({spec.quantize})" if spec.quantize else "")
    log.log(
        NOTICE,
        "%s adapters of rank %d, scale %g, on %d layers%s; %s",
        *(kind, spec.rank, spec.scale, len(spec.targets), whole, base),
    )
    peft = config.model_alignment_strategy.peft
    if peft is not None and peft.lora_verbose:
        log.info("adapters: %s; trained whole: %s", ", ".join(spec.targets), ", ".join(spec.saved) or "none")
    if has_reference and config.model_alignment_strategy.reference_model is None:
        what = (
            f"{start}, the adapter frozen"
            if spec.from_adapter
            else f"{start}: the policy with its adapters off"
        )
        log.log(NOTICE, "the reference is %s, no second model", what)


# Checkpoints, which hold adapters alone


def record_of(spec: AdapterSpec | None, start: WeightSource) -> dict[str, Any]:
    """For a checkpoint: its adapters, and where their base is."""
    if spec is None:
        return {}
    base = start.base if isinstance(start, MergedWeights) else start
    seed = base.seed if isinstance(base, FreshWeights) else None
    path = None if base.path is None else str(base.path.absolute())
    return {RECORD: {**dataclasses.asdict(spec), "base": path, "base_seed": seed}}


class CheckpointAdapter:
    """The adapters in a checkpoint of a run on engine native."""

    def __init__(self, path: Path, spec: AdapterSpec) -> None:
        self.path, self.spec = path, spec
        self._tensors = NativeCheckpoint(path)

    def __str__(self) -> str:
        return f"the adapters of checkpoint {self.path}"

    def read(self, name: str) -> Tensor:
        return self._tensors.read(name)


def adapter_record(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint of either engine says of its adapters; None where it holds a whole model."""
    if nxd_checkpoint.is_checkpoint(checkpoint):
        # Weights alone, as someone has kept them, are a whole model's.
        has_extra = (checkpoint / nxd_checkpoint.EXTRA).is_file()
        return _record(nxd_checkpoint.read_extra(checkpoint)) if has_extra else None
    if not all(map(is_adapter, NativeCheckpoint(checkpoint).names())):
        return None
    found = _record(native_checkpoint.read_extra(checkpoint))
    if found is None:
        raise UserError(
            f"checkpoint {checkpoint} holds adapters and does not say of which model; take another"
        )
    return found


def _record(extra: dict[str, Any]) -> dict[str, Any] | None:
    found = extra.get(RUN_RECORD, {}).get(RECORD)
    return found if isinstance(found, dict) else None


def open_checkpoint(
    checkpoint: Path, model: ModelShape, open_base: Callable[[Path], WeightSource]
) -> WeightSource:
    """A checkpoint of engine native as a whole model's weights, its own, or its base's with its adapters; or
    one of engine nxd that holds adapters.

    Args:
        open_base: opens the base's folder.

    Raises UserError where the base is not where it was.
    """
    record = adapter_record(checkpoint)
    if record is None:
        return NativeCheckpoint(checkpoint)
    adapter = _adapter(checkpoint, model, record)
    if record["base"] is None:
        return MergedWeights(fresh_weights(model, record["base_seed"]), adapter)
    base = Path(record["base"])
    if not base.is_dir():
        raise UserError(
            f"checkpoint {checkpoint} holds adapters alone, and the model that they belong to, {base}, does "
            "not exist any more; put it back"
        )
    return MergedWeights(open_base(base), adapter)


def _adapter(checkpoint: Path, model: ModelShape, record: dict[str, Any]) -> Adapter:
    # A record that was written before there was a field has its default.
    names = [field.name for field in dataclasses.fields(AdapterSpec)]
    settings = {name: record[name] for name in names if name in record}
    settings |= {key: tuple(value) for key, value in settings.items() if isinstance(value, list)}
    spec = AdapterSpec(**settings)
    if not nxd_checkpoint.is_checkpoint(checkpoint):
        return CheckpointAdapter(checkpoint, spec)
    sizes = nxd_checkpoint.sizes_of(checkpoint)
    cuts = sizes[nxd_checkpoint.CUTS]
    assert isinstance(model, DecoderConfig), "engine nxd trains no other"
    partition = Partition(
        model,
        sizes["tensor"],
        sizes["pipeline"],
        sizes["kv_multiplier"],
        sizes["qkv"],
        cuts=None if cuts is None else tuple(cuts),
        adapters=spec,
    )
    return ShardedAdapter(checkpoint, partition)


# The export


def export_adapter(
    folder: Path,
    model: ModelShape,
    spec: AdapterSpec,
    weights: Iterator[tuple[str, Tensor]],
    start: WeightSource,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write PEFT's folder from what an engine trained."""
    base = start.base if isinstance(start, MergedWeights) else start
    path = None if base.path is None else str(base.path.absolute())
    write_peft_folder(folder, model, spec, weights, base=path, dtype=dtype)
