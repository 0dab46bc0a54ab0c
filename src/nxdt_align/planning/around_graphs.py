"""What a step of engine native takes around its compiled parts, on paper: gradients are added up and summed
over data-parallel ranks, weights are gathered from FSDP's shards, stages send hidden states, the optimizer
steps. By the constants of ``devices``, as ``graph_cost`` prices a graph; nothing overlaps.

``workload.py`` has the legend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nxdt_align.planning.adapters import factor_count, saved_by_quantizing
from nxdt_align.planning.device_memory import StageWeights
from nxdt_align.planning.devices import Device
from nxdt_align.planning.graph_cost import Cost, collective_seconds
from nxdt_align.planning.workload import FLOAT, Workload


@dataclass(frozen=True)
class Around:
    """What a stage's rank does around its graphs."""

    micro_batch: Cost
    once: Cost
    """Per step, with the passes."""
    optimizer: Cost


@dataclass(frozen=True)
class _Held:
    """Values of a rank's share of its stage, before data-parallel ranks divide it."""

    trained: int
    outside: int
    """Embedding, last norm and head."""
    total: int
    saved: int
    """Bytes that 4 bits take less."""

    @classmethod
    def of(cls, work: Workload, stage: int) -> _Held:
        counts, first = StageWeights.of(work, stage), sum(work.layers_of_stages[:stage])
        layers = range(first, first + work.layers_of_stages[stage])
        factors = factor_count(work, layers, trained=True)
        extra = factors + factor_count(work, layers, trained=False)
        trained = counts.total if work.adapters is None else factors
        saved = saved_by_quantizing(replace(work, fsdp=False), layers)
        return cls(trained, counts.outside, counts.total + extra, saved)


def around(
    work: Workload, stage: int, device: Device, *, clips: bool, reference_passes: int, chunks: int = 1
) -> Around:
    """Of a rank of ``stage``.

    Args:
        clips: whether gradients are clipped, which reads and writes them once more.
        reference_passes: per micro-batch, that a reference which is not stored takes.
        chunks: shares of the layers per rank, in the interleaved schedule.
    """
    held, copies = _Held.of(work, stage), work.data_parallel
    shards = copies > 1 and (work.fsdp or work.zero1)
    ranks = _data_ranks(work, stage)

    def over_ranks(kind: str, nbytes: int) -> Cost:
        return Cost(collectives=collective_seconds(kind, nbytes, ranks, device))

    def moved(nbytes: float) -> Cost:
        return Cost(memory=nbytes / device.memory_bandwidth)

    compute, sums = work.formats.weight, FLOAT * held.trained
    micro_batch, once = _sends(work, stage, device).times(chunks), Cost()
    if shards and work.fsdp:
        # A layer's weights are gathered for the forward pass and again for the backward pass; what is outside
        # of the layers stays gathered in between.
        layers, outside = (held.total - held.outside) * compute - held.saved, held.outside * compute
        gathered = layers * (2 + reference_passes) + outside * (1 + reference_passes)
        micro_batch += over_ranks("all-gather", gathered) + over_ranks("reduce-scatter", sums)
        micro_batch += moved(3 * sums / copies)
    else:
        # A gradient is read, and added to its sum in float32.
        micro_batch += moved(compute * held.trained + 2 * sums)
    if shards and not work.fsdp:
        once = over_ranks("all-gather", compute * held.trained) + over_ranks("reduce-scatter", sums)
    elif not shards:
        once = over_ranks("all-reduce", sums)
    optimized = held.trained / copies if shards else held.trained
    # Gradient and master weight are read, the weight is written, states are both.
    passes = 3 * FLOAT + 2 * work.formats.state + (3 * FLOAT if clips else 0)
    # Without shards, the weights that are computed with are copied from the masters.
    copied = compute + FLOAT if compute < FLOAT and not shards else 0
    return Around(micro_batch, once, moved(optimized * (passes + copied)))


def _data_ranks(work: Workload, stage: int) -> range:
    """The first tensor-parallel rank's, in the order that ``Topology.of_rank`` gives them."""
    first = stage * work.tensor_parallel * work.data_parallel
    return range(first, first + work.tensor_parallel * work.data_parallel, work.tensor_parallel)


def _sends(work: Workload, stage: int, device: Device) -> Cost:
    """Hidden states and their gradients, one after the other, with each neighbour."""
    apart = work.tensor_parallel * work.data_parallel
    nbytes = work.residual_positions * work.model.hidden_size * work.formats.residual
    last, mine = len(work.layers_of_stages) - 1, stage * apart
    neighbours = [mine - apart] * (stage > 0) + [mine + apart] * (stage < last)
    # What a rank sends of a pair's two parts, as in a gather over both.
    seconds = (collective_seconds("all-gather", 2 * nbytes, (mine, other), device) for other in neighbours)
    return Cost(collectives=2 * sum(seconds))
