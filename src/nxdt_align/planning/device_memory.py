"""A configuration's device memory: the sizes that ``models.memory`` computes with, and a report."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from nxdt_align.config.engines import resolve_engine
from nxdt_align.config.schema import Config, PrecisionConfig
from nxdt_align.data.packing import Bucket, Layout
from nxdt_align.models.partition import even_stages
from nxdt_align.models.presets import LlamaConfig
from nxdt_align.ops.logprobs import CACHED_BYTES, KEPT_BYTES, chunk_size
from nxdt_align.planning.changes import Change, changed, fitting_changes
from nxdt_align.planning.estimate import Memory, estimate
from nxdt_align.planning.workload import FLOAT, AttentionKind, Formats, Workload

GIB = 2**30
NEURON_CORE_BYTES = 16 * GIB
"""Device memory of a NeuronCore of trn1: 32 GiB a chip of two."""
USABLE = 0.9
"""Share of it that is planned with; the rest is for graphs' code and the runtime's buffers."""

_STATES = {
    **dict.fromkeys(("adamw", "adamw_fp32OptState", "adam", "adadelta", "adamax", "rprop"), 2),
    "sgd": 0,
    "adagrad": 1,
    "rmsprop": 1,
    "novograd": 1,
    "adafactor": 0,
    "adan": 3,
}
"""Optimizer -> numbers that it remembers of each weight."""


def memory_report(
    config: Config,
    model: LlamaConfig,
    layout: Layout,
    responses: int,
    bucket: Bucket,
    *,
    needs_reference: bool,
) -> str:
    """What a device needs for the largest bucket, against a NeuronCore's memory where it is one.

    Args:
        layout: how examples are laid into rows.
        responses: responses of an example.
        bucket: the largest shape of a row that training meets.
        needs_reference: whether the loss asks for a reference's log-probabilities.
    """
    where = device_kind(config)
    work = workload(config, model, layout, responses, bucket, needs_reference=needs_reference)
    need = estimate(work)
    name = "a NeuronCore" if where == "neuron" else f"a device ({where})"
    head = (
        f"memory of {name}, rows of {work.tokens} tokens x {work.rows}, tensor parallel "
        f"{work.tensor_parallel}, data parallel {work.data_parallel}, pipeline stage {need.stage + 1} of "
        f"{len(work.layers_of_stages)}"
    )
    lines = [head, *_table(need)]
    if where != "neuron":
        return "\n".join([*lines, f"    {'total':<18}{_gib(need.total)}"])
    limit = NEURON_CORE_BYTES
    fits = need.total <= limit * USABLE
    verdict = "fits" if fits else "does not fit"
    lines.append(
        f"    {'total':<18}{_gib(need.total)} of {limit // GIB} GiB (trn1), {1 - USABLE:.0%} of which is "
        f"left to graphs and runtime: {verdict}"
    )
    if fits:
        return "\n".join(lines)

    def size_of(other: Config) -> int:
        """With other sizes; rows grow and shrink with data.seq_length."""
        part = other.data.seq_length / config.data.seq_length
        shrunk = replace(bucket, tokens=int(bucket.tokens * part), responses=int(bucket.responses * part))
        work = workload(other, model, layout, responses, shrunk, needs_reference=needs_reference)
        return estimate(work).total

    alone, together = fitting_changes(config, model, size_of, int(limit * USABLE))
    if not alone and not together:
        lines.append("  no change of the keys here makes it fit: take a smaller model")
    for chosen in [[change] for change in alone] or filter(None, [together]):
        lines.append(f"  fits with {_line(chosen, size_of(changed(config, chosen)))}")
    return "\n".join(lines)


def _table(need: Memory) -> list[str]:
    rows = {
        "weights": need.weights,
        "gradients": need.gradients,
        "master weights": need.masters,
        "optimizer state": need.states,
        "activations": need.activations,
        "scratch": need.scratch,
    }
    return [f"    {name:<18}{_gib(size)}" for name, size in rows.items()]


def _gib(size: float) -> str:
    return f"{size / GIB:6.2f} GiB"


def _line(chosen: list[Change], size: int) -> str:
    overrides = " ".join(change.overrides for change in chosen)
    note = "; ".join(change.note for change in chosen if change.note)
    return f"{overrides}: {_gib(size).strip()}{f' ({note})' if note else ''}"


# From the configuration


def device_kind(config: Config) -> str:
    """neuron, cuda or cpu: what the configuration is for. Where it leaves that open, Neuron, whatever
    this machine is: a plan is made before."""
    chosen = config.trainer.accelerator
    if chosen in ("cpu", "cuda"):
        return chosen
    if chosen == "neuron" or resolve_engine(config, neuron_available=True) == "nxd":
        return "neuron"
    return "cuda" if torch.cuda.is_available() and chosen == "auto" else "cpu"


def workload(
    config: Config,
    model: LlamaConfig,
    layout: Layout,
    responses: int,
    bucket: Bucket,
    *,
    needs_reference: bool,
) -> Workload:
    """The optimizer step of ``config`` in rows of ``bucket``; see ``memory_report``."""
    strategy, where = config.distributed_strategy, device_kind(config)
    tensor, stages = strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size
    copies = max(1, config.data_parallel_size)
    shards = (strategy.zero1 or strategy.fsdp is not False) and copies > 1
    formats = _formats(config, where)
    if shards and where != "neuron" and not formats.master:
        # FSDP's shards are float32, and what is computed with is gathered from them.
        formats = replace(formats, master=FLOAT)
    if strategy.zero1 and where == "neuron":
        formats = _sharded_by_nxd(formats, config.precision)
    vocabulary = -(-model.vocab_size // tensor)
    tile = CACHED_BYTES if where == "cpu" else chunk_size(vocabulary) * vocabulary * FLOAT
    return Workload(
        model=model,
        formats=formats,
        rows=config.data.micro_batch_size * (responses if layout == "none" else 1),
        tokens=bucket.tokens,
        responses=bucket.responses,
        attention=_attention(config, where, layout),
        recompute=_recompute(config),
        tensor_parallel=tensor,
        kv_heads=_kv_heads(config, model, where),
        sequence_parallel=strategy.sequence_parallel and tensor > 1,
        keeps_gathered=where != "neuron",
        context_parallel=strategy.context_parallel_size,
        stages=_stages(config, model, stages),
        micro_batches=max(2, stages),
        data_parallel=copies,
        zero1=strategy.zero1,
        fsdp=strategy.fsdp is not False,
        tile=tile,
        kept=KEPT_BYTES,
        reference=_reference(config, formats) if needs_reference else 0,
    )


def _reference(config: Config, formats: Formats) -> int:
    """Bytes a weight of the reference that is kept while training; 0 where there is none."""
    settings = config.model_alignment_strategy
    if settings.precompute_ref_log_probs:
        return 0
    return {None: formats.weight, "fp32": FLOAT, "bf16": 2}[settings.reference_dtype]


def _formats(config: Config, where: str) -> Formats:
    """``precision`` in bytes: engine nxd has what NxDT has, native float32 masters below any 16 bits."""
    precision, optim = config.precision, config.model.optim
    states = _STATES.get(optim.name, 2) + bool(optim.params.get("amsgrad"))
    if optim.name in ("sgd", "rmsprop") and optim.params.get("momentum"):
        states += 1
    kind = precision.type
    is_low = precision.xla_use_bf16 == "1" or precision.xla_downcast_bf16 == "1"
    if kind == "fp32" or (kind == "manual" and not is_low):
        return Formats(weight=4, gradient=4, master=0, state=4 * states, activation=4)
    if kind == "autocast":
        return Formats(weight=4, gradient=4, master=0, state=4 * states, activation=2, autocast=True)
    if where != "neuron" or kind == "fp16" or kind.startswith("mixed_precision"):
        return Formats(weight=2, gradient=4, master=4, state=4 * states, activation=2)
    masters = 4 if kind == "manual" and precision.master_weights else 0
    gradient = 4 if kind == "manual" and precision.fp32_grad_acc else 2
    state = 4 if masters or optim.name == "adamw_fp32OptState" else 2
    copy = 4 if masters and gradient == 2 else 0
    return Formats(
        weight=2,
        gradient=gradient,
        master=masters,
        state=state * states,
        activation=2,
        float32_copy=copy,
    )


def _sharded_by_nxd(formats: Formats, precision: PrecisionConfig) -> Formats:
    """ZeRO-1 of engine nxd: each rank has a copy of its rows, in the optimizer's format, with gradients of
    their own. Whole gradients in float32 are made for ``fp32_grads_cc`` alone."""
    rows = formats.master or formats.weight
    copy = formats.float32_copy if precision.fp32_grads_cc else 0
    return replace(formats, master=rows, shard_gradient=rows, float32_copy=copy)


def _attention(config: Config, where: str, layout: Layout) -> AttentionKind:
    if where == "neuron":
        is_causal = layout == "none"
        return "flash" if is_causal and config.model.fusions.flash_attention else "scores"
    return "masked" if config.data.attention == "dense" else "flash"


def _recompute(config: Config) -> tuple[str, ...]:
    granularity = config.model.activations_checkpoint_granularity
    if granularity == "full":
        return ("full",)
    return tuple(config.model.activations_checkpoint_recompute or ()) if granularity else ()


def _kv_heads(config: Config, model: LlamaConfig, where: str) -> int:
    """Of a rank's weights: engine nxd copies heads, native keeps all where there are fewer than ranks."""
    tensor, heads = config.distributed_strategy.tensor_model_parallel_size, model.num_key_value_heads
    if where == "neuron":
        return max(1, heads * config.distributed_strategy.kv_replicator // tensor)
    return heads // tensor if tensor <= heads else heads


def _stages(config: Config, model: LlamaConfig, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage: after model.pipeline_cuts, or even shares."""
    layers, cuts = model.num_hidden_layers, config.model.pipeline_cuts
    if cuts is None or len(cuts) != stages - 1:
        return even_stages(layers, stages)
    ends = [int(cut.rpartition(".")[2]) + 1 for cut in cuts if cut.rpartition(".")[2].isdecimal()]
    bounds = [0, *ends, layers]
    return tuple(after - before for before, after in pairwise(bounds))
