"""How long a graph takes on paper: a roofline per instruction, one after the other.

A matrix product takes as long as the slower of its multiplications and its bytes. What only computes element
by element, or transposes, is taken for part of the instruction that it comes from or goes to, and otherwise
for one pass over the graph's own inputs and results; any other instruction reads its operands from device
memory and writes its result. Collectives are rings, and overlap with nothing. The compiler may do worse, or
better where it keeps values on the chip or overlaps: this prices graphs and layouts against one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from nxdt_align.planning.devices import SHORT_TRANSFER, Device
from nxdt_align.planning.hlo import Computation, HloModule, Instruction

_FREE = """
    parameter constant iota tuple get-tuple-element bitcast bitcast-convert opt-barrier after-all
    broadcast reshape while conditional call token
"""
_FUSED = """
    abs add and atan2 cbrt ceil clamp compare concatenate convert copy cosine divide exponential
    exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply negate not or
    pad power remainder reverse round-nearest-afz round-nearest-even rsqrt select shift-left
    shift-right-arithmetic shift-right-logical sign sine slice sqrt subtract tan tanh transpose xor
"""
_FREE_KINDS, _FUSED_KINDS = frozenset(_FREE.split()), frozenset(_FUSED.split())
_SENT = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
}
"""What each of n ranks of a ring sends: times the larger of the collective's input and output, times
(n - 1) / n."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one execution."""

    products: float = 0.0
    """Matrix products, flash attention among them, where the multiplications are the slower part."""
    memory: float = 0.0
    """Everything whose bytes are the slower part."""
    collectives: float = 0.0

    @property
    def seconds(self) -> float:
        return self.products + self.memory + self.collectives

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.products + other.products,
            self.memory + other.memory,
            self.collectives + other.collectives,
        )

    def times(self, count: float) -> Cost:
        return Cost(self.products * count, self.memory * count, self.collectives * count)


@dataclass(frozen=True)
class StepCost:
    """An optimizer step in one bucket, on one rank."""

    shape: tuple[int, ...]
    """Of a micro-batch: rows, tokens, response tokens, responses."""
    micro_batches: int
    examples: int
    """Over all ranks."""
    first: Cost
    """The first micro-batch."""
    later: Cost
    """Each further one."""
    optimizer: Cost
    flops: int
    """Of all products of the step."""
    stages: int = 1
    """Of the pipeline, each taken to be as slow as this rank's."""
    chunks: int = 1
    """Shares of the layers per rank, in the interleaved schedule."""

    @property
    def waiting(self) -> Cost:
        """While the pipeline fills and empties (1F1B), this stage waits for a micro-batch on each other, of
        one chunk."""
        return self.later.times((self.stages - 1) / self.chunks)

    @property
    def cost(self) -> Cost:
        return self.first + self.later.times(self.micro_batches - 1) + self.waiting + self.optimizer

    def totals(self, device: Device) -> dict[str, float]:
        """Seconds, examples per second, the shares of each part, and of the device's rate in bf16."""
        cost = self.cost
        return {
            "seconds": cost.seconds,
            "examples_per_second": self.examples / cost.seconds,
            "products": cost.products / cost.seconds,
            "memory": cost.memory / cost.seconds,
            "collectives": cost.collectives / cost.seconds,
            "peak": self.flops / cost.seconds / device.flops,
        }


def roofline(flops: float, nbytes: float, peak: float, device: Device) -> Cost:
    """Of ``flops`` at ``peak`` per second, which read and write ``nbytes``."""
    multiplying, moving = flops / peak, nbytes / device.memory_bandwidth
    return Cost(products=multiplying) if multiplying >= moving else Cost(memory=moving)


def collective_seconds(kind: str, nbytes: float, ranks: Sequence[int], device: Device) -> float:
    """Of a ring over ``ranks``, whose numbers say whether it leaves a node.

    Args:
        nbytes: the larger of what a rank gives and what it gets.
    """
    size = len(ranks)
    if size < 2:
        return 0.0
    within = len({rank // device.cores_per_node for rank in ranks}) == 1
    bandwidth = device.link_bandwidth if within else device.network_bandwidth
    return _SENT[kind] * nbytes * (size - 1) / size / bandwidth


def price(module: HloModule, device: Device) -> Cost:
    """Of one execution of a graph."""
    total = Cost()
    for computation in module.computations():
        for instruction in computation.instructions:
            total += _of(computation, instruction, device)
    return total + Cost(memory=_passed(module.entry) / device.memory_bandwidth)


def _passed(entry: Computation) -> int:
    """Bytes of the graph's inputs that instructions of the fused kinds read, such as an optimizer's states,
    and of its results that these write."""
    read = {
        source.name: source.nbytes
        for i in entry.instructions
        if i.kind in _FUSED_KINDS - {"convert", "copy", "slice", "transpose"}
        for n in range(len(i.operands))
        if (source := entry.source(entry.operand(i, n))).kind == "parameter"
    }
    root = entry.instructions[-1]
    results = [entry.operand(root, n) for n in range(len(root.operands))] if root.kind == "tuple" else [root]
    return sum(read.values()) + sum(i.nbytes for i in results if i.kind in _FUSED_KINDS)


def product_flops(c: Computation, i: Instruction) -> int:
    """Multiplications and additions of a ``dot``."""
    left = c.operand(i, 0).shape
    return 2 * i.shape.elements * prod(left.dims[dim] for dim in i.numbers("lhs_contracting_dims"))


def _of(c: Computation, i: Instruction, device: Device) -> Cost:
    if i.kind in _FREE_KINDS or i.kind in _FUSED_KINDS:
        return Cost()
    if i.kind in _SENT:
        given = [c.operand(i, n) for n in range(len(i.operands))]
        most = max(i.nbytes, sum(operand.nbytes for operand in given))
        return Cost(collectives=collective_seconds(i.kind, most, i.first_group, device))
    if i.kind == "dot":
        operands = [c.operand(i, n).shape for n in (0, 1)]
        wide = any(shape.dtype == "f32" for shape in operands)
        peak = device.float32_flops if wide else device.flops
        return roofline(product_flops(c, i), i.nbytes + sum(s.nbytes for s in operands), peak, device)
    if i.kind == "custom-call":
        return _custom_call(c, i, device)
    return Cost(memory=_moved(c, i) / device.memory_bandwidth)


def _moved(c: Computation, i: Instruction) -> int:
    """Bytes that are read and written. Slices shorter than a transfer count as one."""
    if i.kind == "gather":
        size, count = prod(i.numbers("slice_sizes")), 2 * i.shape.elements
    elif i.kind == "scatter":
        updates = c.operand(i, 2).shape
        # Of each update and of what it is added to, and the sum back.
        size, count = prod(updates.dims[dim] for dim in i.numbers("update_window_dims")), 3 * updates.elements
    else:
        # What was only repeated on its way is read once.
        sources = [c.source(c.operand(i, n)) for n in range(len(i.operands))]
        return i.nbytes + sum(s.nbytes for s in sources if s.kind != "constant")
    element = i.nbytes // max(1, i.shape.elements)
    return count // max(1, size) * max(size * element, SHORT_TRANSFER)


def _custom_call(c: Computation, i: Instruction, device: Device) -> Cost:
    """The flash kernels. Their row norms, (B, N, S), say the length; half of the scores are causal. A bias,
    (1, 1, S, S) and the last operand, is read by each head."""
    operands = [c.operand(i, n) for n in range(len(i.operands))]
    nbytes = i.nbytes + sum(operand.nbytes for operand in operands)
    if operands and operands[-1].shape.dims[:2] == (1, 1):
        nbytes += operands[-1].nbytes * (i.shapes[0].dims[1] - 1)
    extent = 2 if 'backend_config="full"' in i.attributes else 1
    if 'custom_call_target="nki_flash_fwd"' in i.attributes:
        tokens, products = i.shapes[1].dims[2], 2
    elif 'custom_call_target="nki_flash_bwd"' in i.attributes:
        # The scores again, and a gradient each of scores, queries, keys and values.
        tokens, products = operands[4].shape.dims[2], 5
    else:
        return Cost(memory=nbytes / device.memory_bandwidth)
    return roofline(extent * products * i.shapes[0].elements * tokens, nbytes, device.flops, device)
