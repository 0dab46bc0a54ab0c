"""What is in the ATen graphs of a compiled step, and what in them TorchNeuron is slow at, or is not known to
take. ``graph_report`` has the forms, ``operators`` what is known of each operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from nxdt_align.planning.around_graphs import around
from nxdt_align.planning.devices import SHORT_TRANSFER, Device
from nxdt_align.planning.graph_cost import Cost, StepCost, collective_seconds, roofline
from nxdt_align.planning.graph_report import (
    MANY_SLICES,
    WIDE_SHARE,
    Collective,
    Finding,
    GraphReport,
    Product,
    Slices,
    Traced,
    ranked,
    size_in_words,
)
from nxdt_align.planning.hlo import Shape
from nxdt_align.planning.kernels import share_at_work
from nxdt_align.planning.operators import (
    COLLECTIVES,
    FLASH,
    FLASH_HEAD,
    FLASH_HEADS,
    FLASH_TOKENS,
    FREE,
    INTERVALS_BACKWARD,
    KERNELS,
    OPERATORS,
    name_of,
    status_of,
)
from nxdt_align.planning.workload import Workload

Shapes = tuple[tuple[int, ...], ...]
"""Of micro-batches: rows, tokens, response tokens, responses."""
_DTYPES = {
    "bool": "pred",
    **{f"int{bits}": f"s{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"f{bits}" for bits in (16, 32, 64)},
    "uint8": "u8",
    "bfloat16": "bf16",
}
"""torch's names -> HLO's."""
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_SOFTMAX = ("_softmax", "_safe_softmax")
_MOVES_ROWS = ("embedding", "index_select", "gather", "index_add", "scatter_add", "embedding_dense_backward")
_FUSED = frozenset(name for name, status in OPERATORS.items() if status == "plain")


class TracedOp(Protocol):
    @property
    def target(self) -> str: ...
    @property
    def results(self) -> Sequence[tuple[str, tuple[int, ...]]]: ...
    @property
    def operands(self) -> Sequence[tuple[str, tuple[int, ...]]]: ...
    @property
    def is_strided(self) -> bool: ...
    @property
    def ranks(self) -> Sequence[int]: ...


class TracedOps(Traced, Protocol):
    """A graph as engine native recorded it."""

    @property
    def ops(self) -> Sequence[TracedOp]: ...
    @property
    def inputs(self) -> Sequence[tuple[str, tuple[int, ...]]]: ...
    @property
    def outputs(self) -> Sequence[tuple[str, tuple[int, ...]]]: ...
    @property
    def executions(self) -> Mapping[tuple[str, Shapes], int]: ...


class _Op:
    """One operator, its shapes in HLO's terms."""

    def __init__(self, op: TracedOp) -> None:
        self.target, self.name = op.target, name_of(op.target)
        self.results = [_shape(form) for form in op.results]
        self.operands = [_shape(form) for form in op.operands]
        self.is_strided, self.ranks = op.is_strided, op.ranks
        self.nbytes = sum(shape.nbytes for shape in self.results)
        self.read = sum(shape.nbytes for shape in self.operands)

    @property
    def flops(self) -> int:
        """Of a product: multiplications and additions."""
        if self.name in _PRODUCTS:
            left = self.operands[-2]
            return 2 * self.results[0].elements * left.dims[-1]
        if self.name not in KERNELS:
            return 0
        kind, products = KERNELS[self.name]
        tokens = self.operands[0].dims[1 if kind == "intervals" else 2]
        pairs = products * self.operands[0].elements * tokens
        return pairs if kind == "flash" else 2 * pairs


def _shape(form: tuple[str, tuple[int, ...]]) -> Shape:
    return Shape(_DTYPES.get(form[0], form[0]), form[1])


def report(graph: TracedOps, device: Device, *, low_precision: bool) -> GraphReport:
    """Read one graph. ``low_precision``: whether the run computes in bf16."""
    ops = [_Op(op) for op in graph.ops]
    products = _products(ops)
    return GraphReport(
        key=graph.key,
        name=graph.name,
        shapes=[list(shape) for shape in graph.shapes],
        instructions=len(ops),
        kinds=dict(Counter(op.name for op in ops).most_common()),
        products=products,
        collectives=_collectives(ops),
        slices=_slices(ops),
        temporaries=_temporaries(ops),
        wide=dict(Counter(s.dtype for op in ops for s in op.results if s.dtype in ("f64", "s64"))),
        unusual=_unusual(ops),
        findings=ranked(_findings(graph, ops, products, low_precision)),
        cost=_price(graph, ops, device),
    )


def _products(ops: Sequence[_Op]) -> list[Product]:
    forms: Counter[tuple[str, int, int, bool]] = Counter()
    for op in ops:
        if op.flops:
            shapes = " x ".join(map(str, op.operands[-2:] if op.name in _PRODUCTS else op.operands[:3]))
            kernel = f" by {op.name}" if op.name in KERNELS else ""
            is_float32 = any(s.dtype == "f32" for s in op.operands[:3] if op.name in _PRODUCTS)
            forms[f"{op.results[0]} = {shapes}{kernel}", op.flops, op.nbytes + op.read, is_float32] += 1
    found = [
        Product(shape, count, flops * count, nbytes * count, is_float32)
        for (shape, flops, nbytes, is_float32), count in forms.items()
    ]
    return sorted(found, key=lambda product: -product.flops)


def _collectives(ops: Sequence[_Op]) -> list[Collective]:
    forms = Counter(
        (COLLECTIVES[op.name], str(op.results[0]), max(op.nbytes, op.read), tuple(op.ranks))
        for op in ops
        if op.name in COLLECTIVES
    )
    return [
        Collective(kind, shape, count, nbytes, len(ranks), str(list(ranks)))
        for (kind, shape, nbytes, ranks), count in forms.items()
    ]


def _slices(ops: Sequence[_Op]) -> list[Slices]:
    forms = Counter(
        (op.name, str(op.operands[0]), *_moved(op)) for op in ops if op.name in _MOVES_ROWS and op.operands
    )
    return [Slices(kind, shape, size, slices, n) for (kind, shape, size, slices), n in forms.items()]


def _moved(op: _Op) -> tuple[int, int]:
    """Entries of a slice, and slices."""
    # What is gathered, or added: the result, but of operators that add to a whole tensor.
    moved = op.results[0]
    if op.name in ("index_add", "scatter_add"):
        moved = op.operands[-1]
    elif op.name == "embedding_dense_backward":
        moved = op.operands[0]
    is_single = op.name in ("gather", "scatter_add")
    size = 1 if is_single or not moved.dims else moved.dims[-1]
    return size, moved.elements // max(1, size)


def _temporaries(ops: Sequence[_Op], most: int = 8) -> list[str]:
    sizes = Counter((shape, op.name) for op in ops if op.name not in FREE for shape in op.results)
    largest = sorted(sizes, key=lambda each: -each[0].nbytes)[:most]
    return [
        f"{size_in_words(shape.nbytes)} {kind} {shape}, {sizes[shape, kind]} times" for shape, kind in largest
    ]


def _unusual(ops: Sequence[_Op]) -> dict[str, int]:
    found = Counter(op.target for op in ops if status_of(op.target) not in ("lowered", "plain"))
    return {f"{target} ({status_of(target)})": count for target, count in found.items()}


# Findings


def _findings(
    graph: TracedOps, ops: Sequence[_Op], products: Sequence[Product], low_precision: bool
) -> Iterator[Finding]:
    yield from _attention(graph, ops)
    total, wide = sum(p.flops for p in products), [p for p in products if p.is_float32]
    share = sum(p.flops for p in wide) / max(1, total)
    if low_precision and share > WIDE_SHARE:
        yield Finding(
            "float32 products",
            f"{share:.0%} of the multiplications are in float32, though precision.type computes in bf16; the "
            f"largest: {wide[0].shape}",
            "cast both operands to the compute dtype; the tensor engine is 4 times slower in float32",
            sum(p.flops for p in wide),
        )
    double = [op for op in ops if any(s.dtype in ("s64", "f64") for s in op.results)]
    if double:
        yield Finding(
            "64 bits",
            f"{len(double)} results of 64 bits, the first of {double[0].target}: {double[0].results[0]}; "
            "they are cast to 32, with a warning",
            "make such tensors as int32 or float32",
            sum(op.nbytes for op in double),
        )
    strided = [op for op in ops if op.is_strided and op.results[0].elements >= MANY_SLICES]
    if strided:
        yield Finding(
            "strided slices",
            f"{len(strided)} slices of every n-th entry, the first of {strided[0].operands[0]}",
            "cut in halves, or view and stack: about 60 times faster",
            sum(op.nbytes for op in strided),
        )
    for target in dict.fromkeys(op.target for op in ops):
        status = status_of(target)
        if status in _ADVICE:
            advice = _DROPOUT if name_of(target).startswith("native_dropout") else _ADVICE[status]
            yield Finding(status, target, advice, cost=0)


_DROPOUT = "model_alignment_strategy.peft.lora_dropout=0 needs none"
_ADVICE = {
    "data-dependent": "no graph has shapes that follow from values: use a mask, or nonzero_static",
    "fallback": "it runs on the host, or stops the run: use other operators",
    "unknown": "see on a device whether it falls back: torch_neuronx.get_fallback_ops(); docs/graphs.md",
}


def _attention(graph: TracedOps, ops: Sequence[_Op]) -> Iterator[Finding]:
    tokens = {shape[1] for shape in graph.shapes}
    masked = [
        op
        for op in ops
        if op.name in _SOFTMAX and len(op.results[0].dims) >= 4 and op.results[0].dims[-1] in tokens
    ]
    if masked:
        yield Finding(
            "masked attention",
            f"scores are materialised, {masked[0].results[0]}, {len(masked)} times: a mask keeps attention "
            "from the flash kernel",
            "data.attention=nki has kernels with bounds (not run on a chip yet), and data.packing=none needs "
            "no mask; data.packing=auto compares them",
            sum(op.nbytes for op in masked),
        )
    for op in ops:
        if op.name in FLASH:
            rows, heads, size, head = op.operands[0].dims
            if size % FLASH_TOKENS or head > FLASH_HEAD or rows * heads > FLASH_HEADS:
                yield Finding(
                    "flash kernel",
                    f"takes rows of a multiple of {FLASH_TOKENS} tokens, heads of {FLASH_HEAD} and "
                    f"{FLASH_HEADS} rows x heads at most, but is given {op.operands[0]}: scores are "
                    "materialised",
                    "data.seq_length, data.micro_batch_size, or more tensor parallel ranks",
                    op.flops,
                )
                return


# Prices


def _price(graph: TracedOps, ops: Sequence[_Op], device: Device) -> Cost:
    """As ``graph_cost`` prices instructions: what computes element by element is fused, and the graph's own
    inputs and results are read and written once."""
    total = Cost(memory=sum(_shape(f).nbytes for f in graph.outputs) / device.memory_bandwidth)
    for op in ops:
        total += _cost(op, device)
    return total


def _cost(op: _Op, device: Device) -> Cost:
    if op.name in COLLECTIVES:
        most = max(op.nbytes, op.read)
        return Cost(collectives=collective_seconds(COLLECTIVES[op.name], most, op.ranks, device))
    if op.flops:
        wide = op.name in _PRODUCTS and any(s.dtype == "f32" for s in op.operands)
        peak = device.float32_flops if wide else device.flops
        if op.name == INTERVALS_BACKWARD:
            q, k = (shape.dims for shape in op.operands[:2])
            peak *= share_at_work(q[2], k[2], device.physical_cores)
        return roofline(op.flops, op.nbytes + op.read, peak, device)
    if op.name in FREE or op.name in _FUSED:
        return Cost()
    if op.name in _MOVES_ROWS and op.operands:
        size, slices = _moved(op)
        element = op.results[0].nbytes // max(1, op.results[0].elements)
        return Cost(memory=2 * slices * max(size * element, SHORT_TRANSFER) / device.memory_bandwidth)
    return Cost(memory=(op.nbytes + op.read) / device.memory_bandwidth)


def step_on_paper(
    graphs: Sequence[TracedOps],
    made: Mapping[str, GraphReport],
    work: Workload,
    device: Device,
    *,
    steps: Collection[str],
    shapes: Shapes,
    micro_batches: int,
    examples: int,
    clips: bool,
    chunks: int,
) -> StepCost:
    """A step whose graphs were recorded over one micro-batch of the whole model, with what lies around them:
    of the pipeline's stage that takes longest.

    Args:
        graphs: recorded in the step, with how often each was run.
        made: their reports, by key.
        work: the sizes of the step.
        steps: what counts as the step: its training, and a reference's pass that is part of it.
        shapes: of the micro-batch that was recorded.
        clips, chunks: see ``around_graphs``.
    """

    def of_stage(stage: int) -> StepCost:
        shares = _shares(work, stage)
        run = [
            (made[graph.key], graph.executions.get((step, shapes), 0) * shares[graph.name.partition(",")[0]])
            for graph in graphs
            for step in steps
        ]
        extra = around(work, stage, device, clips=clips, reference_passes=len(steps) - 1, chunks=chunks)
        later = sum((each.cost.times(count) for each, count in run), extra.micro_batch)
        return StepCost(
            shape=tuple(shapes[0]),
            micro_batches=micro_batches,
            examples=examples,
            first=later + extra.once,
            later=later,
            optimizer=extra.optimizer,
            flops=round(sum(each.flops * count for each, count in run) * micro_batches),
            stages=len(work.layers_of_stages),
            chunks=chunks,
        )

    return max(map(of_stage, range(len(work.layers_of_stages))), key=lambda step: step.cost.seconds)


def _shares(work: Workload, stage: int) -> dict[str, float]:
    """Part of the model -> how much of it the stage has."""
    is_last = float(stage == len(work.layers_of_stages) - 1)
    layers = work.layers_of_stages[stage] / work.model.num_hidden_layers
    return {"embedding": float(stage == 0), "layer": layers, "head": is_last, "loss": is_last}
