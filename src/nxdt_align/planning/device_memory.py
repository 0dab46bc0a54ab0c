"""Device memory of training in bytes per device, computed without allocating anything.

docs/memory.md derives the terms and says how they were checked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from nxdt_align.config.schema import Config
from nxdt_align.data.packing import Bucket, Layout
from nxdt_align.models.config import DecoderConfig, ModelShape, weight_shapes
from nxdt_align.models.sharding import KV_HEADS, split_of
from nxdt_align.planning.activations import above_layers, held_by_model, kept_of_layer, layer_scratch
from nxdt_align.planning.adapters import factor_count, saved_by_quantizing
from nxdt_align.planning.changes import Change, changed, fitting_changes
from nxdt_align.planning.devices import DEFAULT_LNC
from nxdt_align.planning.model_states import states_report
from nxdt_align.planning.workload import Workload, device_kind, is_for_trn1, workload

GIB = 2**30
NEURON_CORE_BYTES = 16 * GIB
"""Device memory of a trn1 NeuronCore: a chip has 32 GiB and two cores."""
CORE_BYTES = {"trn2": 12 * GIB, "trn3": 18 * GIB}
"""The same of a physical core of trn2 and trn3, whose chips have eight; a logical one is of trainer.lnc."""
USABLE = 0.9
"""Fraction of it that a plan may use; the rest is for the graphs' code and the runtime's buffers."""


# The report


def memory_report(
    config: Config,
    model: ModelShape,
    layout: Layout,
    responses: int,
    bucket: Bucket,
    *,
    needs_reference: bool,
) -> str:
    """The memory that a device needs for the largest bucket, compared to a NeuronCore's memory on Neuron.

    Args:
        layout: how examples are laid into rows.
        responses: responses of an example.
        bucket: the largest shape of a row that training meets.
        needs_reference: whether the loss asks for a reference's log-probabilities.
    """
    where = device_kind(config)
    if not isinstance(model, DecoderConfig):
        return states_report(config, model, where, needs_reference=needs_reference)
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
    (chip, limit), *others = core_memory(config).items()
    fits = need.total <= limit * USABLE

    def verdict(limit: int, chip: str) -> str:
        said = "fits" if need.total <= limit * USABLE else "does not fit"
        reserved = f"{1 - USABLE:.0%} reserved for graphs and runtime"
        return f"of {limit // GIB} GiB ({chip}, {reserved}): {said}"

    lines.append(f"    {'total':<18}{_gib(need.total)} {verdict(limit, chip)}")
    lines += [f"    {'':<18}{'':>10} {verdict(other, name)}" for name, other in others]
    if fits:
        return "\n".join(lines)

    def size_of(other: Config) -> int:
        """With other sizes; rows grow and shrink with data.seq_length."""
        # Assumes that row lengths scale with seq_length: planning them anew would retokenize the data.
        part = other.data.seq_length / config.data.seq_length
        shrunk = replace(bucket, tokens=int(bucket.tokens * part), responses=int(bucket.responses * part))
        work = workload(other, model, layout, responses, shrunk, needs_reference=needs_reference)
        return estimate(work).total

    alone, together = fitting_changes(config, model, size_of, int(limit * USABLE))
    if not alone and not together:
        lines.append("  no change of these keys makes it fit: choose a smaller model")
    for chosen in [[change] for change in alone] or filter(None, [together]):
        lines.append(f"  fits with {_line(chosen, size_of(changed(config, chosen)))}")
    return "\n".join(lines)


def memory_fault(
    config: Config, model: DecoderConfig, responses: int, bucket: Bucket, *, needs_reference: bool
) -> str | None:
    """Why a NeuronCore's memory does not hold a step in rows of ``bucket``; None where it does."""
    need = estimate(
        workload(config, model, config.layout, responses, bucket, needs_reference=needs_reference)
    ).total
    (chip, limit), *_ = core_memory(config).items()
    if need <= limit * USABLE:
        return None
    return f"takes {_gib(need).strip()} of {limit // GIB} GiB ({chip})"


def core_memory(config: Config) -> dict[str, int]:
    """Which NeuronCore -> its bytes."""
    if is_for_trn1(config):
        return {"trn1": NEURON_CORE_BYTES}
    cores = config.trainer.lnc or DEFAULT_LNC
    return {f"{chip}, lnc {cores}": cores * size for chip, size in CORE_BYTES.items()}


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


# The estimate


@dataclass(frozen=True)
class Memory:
    """Bytes per device, for the pipeline stage that needs the most."""

    stage: int
    weights: int
    """The compute weights, including those of a frozen reference."""
    gradients: int
    masters: int
    states: int
    activations: int
    """What the forward pass keeps for the backward pass, of all micro-batches in flight."""
    scratch: int
    """Temporary memory, the largest of: a recomputed layer and its gradients; everything above the last
    layer, including logits; gradients in the optimizer's format (activations are free by then)."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.states + self.activations + self.scratch


def estimate(work: Workload) -> Memory:
    """The peak memory of the stage that needs the most.

    The peak is either in the backward pass of a micro-batch after the first, when accumulated gradients
    exist, or in the optimizer's step.
    """
    return max((_of_stage(work, stage) for stage in range(len(work.layers_of_stages))), key=_total)


def _total(memory: Memory) -> int:
    return memory.total


def _of_stage(work: Workload, stage: int) -> Memory:
    stages = len(work.layers_of_stages)
    counts, formats = StageWeights.of(work, stage), work.formats
    first = sum(work.layers_of_stages[:stage])
    layers = range(first, first + work.layers_of_stages[stage])
    trained = factor_count(work, layers, trained=True) if work.adapters is not None else counts.total
    extra = factor_count(work, layers, trained=False) + (trained if work.adapters is not None else 0)
    # 1F1B: stage i of n starts n - i forward passes before its first backward pass.
    in_flight = min(stages - stage, work.micro_batches)
    held = held_by_model(work) + in_flight * work.layers_of_stages[stage] * kept_of_layer(work)
    scratch = layer_scratch(work, counts.largest)
    if stage == stages - 1:
        scratch = max(scratch, above_layers(work, counts.head))
    shard = -(-trained // work.data_parallel)
    # Activations are free before the optimizer's step, so only what exceeds them adds to the peak.
    scratch = max(scratch, trained * formats.float32_copy + shard * formats.shard_gradient - held)
    weights, gradients, reference = counts.total + extra, trained * formats.gradient, counts.total
    if work.fsdp and work.data_parallel > 1:
        frozen = 0 if work.adapters is None else -(-(counts.total + extra - trained) // work.data_parallel)
        weights, reference = counts.gathered + frozen, -(-counts.total // work.data_parallel)
        # FSDP2 reduces a layer's whole gradients, in the compute dtype, into the float32 shard.
        reduced = counts.gathered if work.adapters is None else trained
        gradients = shard * formats.gradient + reduced * formats.weight
    optimized = shard if work.zero1 or work.fsdp else trained
    return Memory(
        stage=stage,
        weights=weights * formats.weight - saved_by_quantizing(work, layers) + reference * work.reference,
        gradients=gradients,
        masters=optimized * formats.master,
        states=optimized * formats.state,
        activations=held,
        scratch=scratch,
    )


# Weights


@dataclass(frozen=True)
class StageWeights:
    """Parameter counts of a stage on one tensor-parallel rank."""

    layer: int
    layers: int
    largest: int
    """The layer's largest single weight."""
    outside: int
    """Embedding, last norm and head."""
    head: int

    @classmethod
    def of(cls, work: Workload, stage: int) -> StageWeights:
        # Layers are alike: one of them, and what is outside.
        sizes = {
            name: _own_size(work, name, shape)
            for name, shape in weight_shapes(work.model).items()
            if not name.startswith("model.layers.") or name.startswith("model.layers.0.")
        }
        layer = [size for name, size in sizes.items() if name.startswith("model.layers.0.")]
        is_first, is_last = stage == 0, stage == len(work.layers_of_stages) - 1
        embedding = sizes["model.embed_tokens.weight"]
        # A tied head is a copy of the embedding in a last stage that is not the first.
        above = sizes["model.norm.weight"] + sizes.get("lm_head.weight", 0 if is_first else embedding)
        return cls(
            layer=sum(layer),
            layers=work.layers_of_stages[stage],
            largest=max(layer),
            outside=is_first * embedding + is_last * above,
            head=sizes.get("lm_head.weight", embedding),
        )

    @property
    def total(self) -> int:
        return self.layers * self.layer + self.outside

    @property
    def gathered(self) -> int:
        """What FSDP gathers at a time: the weights outside the layers, one layer, and the prefetched next
        one."""
        return self.outside + 2 * self.layer


def _own_size(work: Workload, name: str, shape: tuple[int, ...]) -> int:
    split, size = split_of(name), prod(shape)
    if split.replicated:
        return size
    if split == KV_HEADS:
        return size // work.model.num_key_value_heads * (work.kv_heads or work.own_kv_heads)
    return size // work.tensor_parallel
