"""Changes to a configuration that lower its device memory, and which of them make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nxdt_align.config.schema import Config
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.planning.devices import device_of
from nxdt_align.planning.workload import is_for_nxd, is_for_trn1

ROUNDING = 64
"""Row lengths are multiples of this."""
_STRATEGY = "distributed_strategy"
_TENSOR, _PIPELINE = f"{_STRATEGY}.tensor_model_parallel_size", f"{_STRATEGY}.pipeline_model_parallel_size"

SizeOf = Callable[[Config], int]
"""Bytes that a configuration takes on a device."""


@dataclass(frozen=True)
class Change:
    """Values of the configuration, and a note if they cost more than time."""

    values: Mapping[str, Any]
    note: str = ""

    @property
    def overrides(self) -> str:
        """As the command line takes them."""
        return " ".join(f"{path}={value}" for path, value in self.values.items())


def changed(config: Config, chosen: Sequence[Change]) -> Config:
    """``config`` with the values of ``chosen``, later ones last."""
    for change in chosen:
        for path, value in change.values.items():
            config = _with_value(config, path.split("."), value)
    return config


def _with_value(section: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    inner = _with_value(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: inner})


def fitting_changes(
    config: Config, model: DecoderConfig, size_of: SizeOf, limit: int
) -> tuple[list[Change], list[Change]]:
    """The mildest change of each group that alone brings ``config`` to ``limit`` bytes; if there is none,
    changes that do so together. Both lists are empty if nothing helps."""
    alone = []
    for group in GROUPS:
        fitting = [c for c in group(config, model) if size_of(changed(config, [c])) <= limit]
        alone += fitting[:1]
    if alone:
        return alone, []
    chosen: list[Change] = []
    for group in GROUPS:
        options = list(group(changed(config, chosen), model))
        totals = [size_of(changed(config, [*chosen, option])) for option in options]
        for option, total in zip(options, totals, strict=True):
            if total <= limit:
                return [], _needed(config, [*chosen, option], size_of, limit)
        if options and min(totals) < size_of(changed(config, chosen)):
            # Greedy: take the group's best change, and go on to the next, harsher group.
            chosen.append(options[totals.index(min(totals))])
    return [], []


def _needed(config: Config, chosen: list[Change], size_of: SizeOf, limit: int) -> list[Change]:
    """``chosen`` without the changes that the others make unnecessary, the harshest dropped first."""
    for change in reversed(list(chosen)):
        others = [other for other in chosen if other is not change]
        if size_of(changed(config, others)) <= limit:
            chosen = others
    return chosen


# Groups of changes: at most one per group is applied; the mildest comes first.


def _checkpointing(config: Config, model: DecoderConfig) -> list[Change]:
    path = "model.activations_checkpoint_granularity"
    return [] if config.model.activations_checkpoint_granularity == "full" else [Change({path: "full"})]


def _micro_batch(config: Config, model: DecoderConfig) -> list[Change]:
    now = config.data.micro_batch_size
    return [Change({"data.micro_batch_size": size}) for size in range(now - 1, 0, -1) if now % size == 0]


def _sequence_parallel(config: Config, model: DecoderConfig) -> list[Change]:
    strategy = config.distributed_strategy
    if strategy.sequence_parallel or strategy.tensor_model_parallel_size == 1:
        return []
    return [Change({f"{_STRATEGY}.sequence_parallel": True})]


def _zero1(config: Config, model: DecoderConfig) -> list[Change]:
    strategy = config.distributed_strategy
    if strategy.zero1 or strategy.fsdp is not False or config.data_parallel_size == 1:
        return []
    return [Change({f"{_STRATEGY}.zero1": True})]


def _reference(config: Config, model: DecoderConfig) -> list[Change]:
    strategy = config.model_alignment_strategy
    if strategy.precompute_ref_log_probs:
        return []
    return [Change({f"model_alignment_strategy.{strategy.objective}.precompute_ref_log_probs": True})]


def _tensor_parallel(config: Config, model: DecoderConfig) -> list[Change]:
    """Wider tensor parallel, on more cores if needed."""
    now, kv_heads = config.distributed_strategy.tensor_model_parallel_size, model.num_key_value_heads
    wholes = (model.num_attention_heads, model.intermediate_size, model.vocab_size)
    found = []
    for size in (2, 4, 8, 16, 32):
        is_even = not any(whole % size for whole in wholes)
        if size <= now or not is_even or (kv_heads % size and size % kv_heads):
            continue
        # Each rank needs a whole kv head, so NxD replicates heads (kv_replicator) above that number; native
        # does not read that key.
        copies = max(1, size // kv_heads)
        values: dict[str, Any] = {_TENSOR: size}
        if is_for_nxd(config) and copies != config.distributed_strategy.kv_replicator:
            values |= {f"{_STRATEGY}.kv_replicator": copies, "model.qkv_linear": copies > 1}
        found.append(Change(values | _cores(config, config.model_parallel_size // now * size)))
    return found


def _pipeline(config: Config, model: DecoderConfig) -> list[Change]:
    now = config.distributed_strategy.pipeline_model_parallel_size
    # Engine nxd refuses a tied head across stages; model.pipeline_cuts fixes the number of stages.
    if (is_for_nxd(config) and model.tie_word_embeddings) or config.model.pipeline_cuts is not None:
        return []
    return [
        Change({_PIPELINE: stages} | _cores(config, config.model_parallel_size // now * stages))
        for stages in (2, 4, 8, 16, 32)
        if now < stages <= model.num_hidden_layers
    ]


def _cores(config: Config, cores: int) -> dict[str, Any]:
    """Cores for whole copies of the model; nothing if the present ones already divide evenly."""
    if config.world_size % cores == 0:
        return {}
    device = device_of("trn1" if is_for_trn1(config) else "trn2", config.trainer.lnc)
    nodes = -(-cores // device.cores_per_node)
    values = {"trainer.devices": min(cores, device.cores_per_node)}
    return values if nodes == config.trainer.num_nodes else values | {"trainer.num_nodes": nodes}


def _shorter(config: Config, model: DecoderConfig) -> list[Change]:
    """Shorter examples; rows shrink alike."""
    strategy = config.model_alignment_strategy
    found = []
    for part in (0.75, 0.5, 0.25, 0.125):
        length = int(config.data.seq_length * part) // ROUNDING * ROUNDING
        values = {"data.seq_length": length}
        if strategy.max_prompt_length >= length:
            values[f"model_alignment_strategy.{strategy.objective}.max_prompt_length"] = length // 2
        if length > 0:
            found.append(Change(values, note="longer examples are cut"))
    return found


GROUPS: tuple[Callable[[Config, DecoderConfig], list[Change]], ...] = (
    *(_checkpointing, _micro_batch, _sequence_parallel, _zero1, _reference),
    *(_tensor_parallel, _pipeline, _shorter),
)
"""Mildest first."""
