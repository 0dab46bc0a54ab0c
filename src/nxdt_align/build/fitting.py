"""Changes of a configuration that lower its device memory, and which of them make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nxdt_align.config.schema import Config
from nxdt_align.models.memory import estimate
from nxdt_align.models.workload import Workload, even_stages

ROUNDING = 64
"""Row lengths are multiples of this."""
CORES_OF_A_NODE = 32


@dataclass(frozen=True)
class Change:
    """Overrides of the configuration, and what they do to a step's sizes."""

    keys: str
    apply: Callable[[Workload], Workload]
    note: str = ""
    """What it costs, where that is more than time."""


def changes(config: Config, work: Workload) -> list[list[Change]]:
    """Groups of changes, mildest group first; of a group one is enough, mildest first."""
    groups = [
        _checkpointing(work),
        _micro_batch(config, work),
        _sequence_parallel(work),
        _zero1(work),
        _reference(work),
        _tensor_parallel(config, work),
        _pipeline(config, work),
        _shorter(config, work),
    ]
    return [group for group in groups if group]


def fitting_changes(
    groups: Sequence[Sequence[Change]], work: Workload, limit: int
) -> tuple[list[Change], list[Change]]:
    """Every change that alone brings ``work`` to ``limit`` bytes, the mildest of its group; and where there
    is none, changes that do so together. Both are empty where nothing does."""
    alone = [change for group in groups if (change := _first_fit(group, work, limit)) is not None]
    if alone:
        return alone, []
    chosen: list[Change] = []
    changed = work
    for group in groups:
        change = _first_fit(group, changed, limit)
        best = change or min(group, key=lambda option: _bytes([option], changed))
        chosen.append(best)
        changed = best.apply(changed)
        if change is not None:
            return [], _needed(chosen, work, limit)
    return [], []


def _needed(chosen: list[Change], work: Workload, limit: int) -> list[Change]:
    """``chosen`` without what the others make up for, the harshest left out first."""
    for change in reversed(list(chosen)):
        others = [other for other in chosen if other is not change]
        if _bytes(others, work) <= limit:
            chosen = others
    return chosen


def _first_fit(group: Sequence[Change], work: Workload, limit: int) -> Change | None:
    return next((change for change in group if _bytes([change], work) <= limit), None)


def _bytes(chosen: Sequence[Change], work: Workload) -> int:
    for change in chosen:
        work = change.apply(work)
    return estimate(work).total


# The groups


def _checkpointing(work: Workload) -> list[Change]:
    if "full" in work.recompute:
        return []
    key = "model.activations_checkpoint_granularity=full"
    return [Change(key, lambda w: replace(w, recompute=("full",)))]


def _micro_batch(config: Config, work: Workload) -> list[Change]:
    now = config.data.micro_batch_size
    rows_each = work.rows // now
    return [
        Change(f"data.micro_batch_size={size}", lambda w, size=size: replace(w, rows=size * rows_each))  # type: ignore[misc]
        for size in range(now - 1, 0, -1)
        if now % size == 0
    ]


def _sequence_parallel(work: Workload) -> list[Change]:
    if work.sequence_parallel or work.tensor_parallel == 1:
        return []
    return [
        Change("distributed_strategy.sequence_parallel=True", lambda w: replace(w, sequence_parallel=True))
    ]


def _zero1(work: Workload) -> list[Change]:
    if work.zero1 or work.fsdp or work.data_parallel == 1:
        return []
    return [Change("distributed_strategy.zero1=True", lambda w: replace(w, zero1=True))]


def _reference(work: Workload) -> list[Change]:
    key = "model_alignment_strategy.dpo.precompute_ref_log_probs=True"
    return [Change(key, lambda w: replace(w, reference=False))] if work.reference else []


def _tensor_parallel(config: Config, work: Workload) -> list[Change]:
    """Wider tensor parallel, on as many more cores as it takes."""
    model, now = work.model, work.tensor_parallel
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    sizes = [
        size
        for size in (2, 4, 8, 16, 32)
        if size > now
        and not any(whole % size for whole in (heads, model.intermediate_size, model.vocab_size))
        and (kv_heads % size == 0 or size % kv_heads == 0)
    ]
    found = []
    for size in sizes:
        copies = max(1, size // kv_heads)
        keys = f"distributed_strategy.tensor_model_parallel_size={size}"
        if copies != config.distributed_strategy.kv_replicator:
            keys += f" distributed_strategy.kv_replicator={copies} model.qkv_linear={copies > 1}"
        cores = size * (config.model_parallel_size // now)
        found.append(
            Change(
                keys + _more_cores(config, cores),
                lambda w, size=size, cores=cores: replace(  # type: ignore[misc]
                    w,
                    tensor_parallel=size,
                    kv_heads=max(1, kv_heads // size),
                    data_parallel=_copies_left(config, cores),
                ),
            )
        )
    return found


def _pipeline(config: Config, work: Workload) -> list[Change]:
    layers, now = work.model.num_hidden_layers, len(work.layers_of_stages)
    found = []
    for stages in (2, 4, 8, 16):
        if stages <= now or stages > layers or work.model.tie_word_embeddings:
            continue
        cores = stages * (config.model_parallel_size // now)
        shares = even_stages(layers, stages)
        found.append(
            Change(
                f"distributed_strategy.pipeline_model_parallel_size={stages}" + _more_cores(config, cores),
                lambda w, shares=shares, cores=cores: replace(  # type: ignore[misc]
                    w,
                    stages=shares,
                    micro_batches=max(w.micro_batches, len(shares)),
                    data_parallel=_copies_left(config, cores),
                ),
            )
        )
    return found


def _shorter(config: Config, work: Workload) -> list[Change]:
    """Shorter examples, in steps of a quarter, rows shrinking alike."""
    now = config.data.seq_length
    found = []
    for part in (0.75, 0.5, 0.25, 0.125):
        length = int(now * part) // ROUNDING * ROUNDING
        if length <= 0:
            continue
        prompt = config.model_alignment_strategy.max_prompt_length
        keys = f"data.seq_length={length}"
        if prompt >= length:
            keys += f" model_alignment_strategy.{config.model_alignment_strategy.objective}"
            keys += f".max_prompt_length={length // 2}"
        found.append(
            Change(
                keys,
                lambda w, part=length / now: replace(  # type: ignore[misc]
                    w, tokens=int(w.tokens * part), responses=max(1, int(w.responses * part))
                ),
                note="longer examples are cut",
            )
        )
    return found


def _copies_left(config: Config, cores: int) -> int:
    """Data-parallel size where one copy of the model takes ``cores``."""
    return max(1, config.world_size // cores)


def _more_cores(config: Config, cores: int) -> str:
    """Overrides for a run on enough cores, where it has not enough or they do not come out even."""
    if config.world_size % cores == 0:
        return ""
    if cores <= CORES_OF_A_NODE:
        return f" trainer.devices={cores}"
    nodes = -(-cores // CORES_OF_A_NODE)
    return f" trainer.devices={CORES_OF_A_NODE} trainer.num_nodes={nodes}"
