"""What a run's graphs are made of, and what in them Trainium is slow at or has no instruction for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Protocol

from nxdt_align.planning.devices import Device
from nxdt_align.planning.graph_cost import Cost, StepCost, price, product_flops
from nxdt_align.planning.hlo import Computation, Instruction, Shape, parse

KNOWN_CALLS = ("custom-call nki_flash_fwd", "custom-call nki_flash_bwd")
"""What stands for NxD's flash kernel."""
_KINDS = """
    abs add after-all all-gather all-reduce all-to-all and atan2 bitcast bitcast-convert broadcast
    call cbrt ceil clamp collective-permute compare concatenate constant convert convolution copy
    cosine divide dot dynamic-slice dynamic-update-slice exponential exponential-minus-one floor
    gather get-tuple-element iota is-finite log log-plus-one logistic maximum minimum multiply
    negate not opt-barrier or pad parameter power reduce reduce-scatter reduce-window remainder
    reshape reverse rng-bit-generator round-nearest-afz round-nearest-even rsqrt scatter select
    select-and-scatter shift-left shift-right-arithmetic shift-right-logical sign sine slice sort
    sqrt subtract tan tanh transpose tuple xor
"""
KNOWN_KINDS = frozenset(_KINDS.split())
"""Kinds that are no news. Loops, branches, random numbers, custom calls and what is not here are named."""
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SLICES = ("gather", "scatter")
MANY_SLICES = 2**16
"""Single elements that a gather or scatter may move without being a finding: each is a descriptor."""
WIDE_SHARE = 0.01
"""Of a graph's multiplications, how many may be in float32 where the run computes in bf16."""
_NO_TEMPORARIES = ("parameter", "tuple", "get-tuple-element", "constant", "bitcast", "opt-barrier")


class Traced(Protocol):
    """A graph as either engine recorded it."""

    @property
    def key(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def shapes(self) -> Sequence[Sequence[int]]: ...


class TracedGraph(Traced, Protocol):
    """A graph as engine nxd recorded it."""

    @property
    def hlo(self) -> str: ...


@dataclass(frozen=True)
class Product:
    """Matrix products of one form."""

    shape: str
    """result = left x right"""
    count: int
    flops: int
    """Of all of them together."""
    nbytes: int
    """Read and written by all of them, where nothing stays on the chip."""
    is_float32: bool


@dataclass(frozen=True)
class Collective:
    kind: str
    shape: str
    count: int
    nbytes: int
    """Of one."""
    group_size: int
    groups: str


@dataclass(frozen=True)
class Slices:
    """Gathers or scatters of one form."""

    kind: str
    shape: str
    """Of what is read from, or written to."""
    slice_elements: int
    slices: int
    """Moved by one."""
    count: int

    @property
    def single(self) -> bool:
        return self.slice_elements == 1 and self.slices > 1


@dataclass(frozen=True)
class Finding:
    """Something to change. Those that cost most come first."""

    rule: str
    what: str
    advice: str
    """The key or the file to change."""
    cost: int
    """What findings are ordered by: elements, bytes or multiplications, so that between rules the order is
    rough; 0 where no size tells."""


@dataclass(frozen=True)
class GraphReport:
    key: str
    name: str
    shapes: list[list[int]]
    """Of the micro-batches: rows, tokens, response tokens, responses."""
    instructions: int
    kinds: dict[str, int]
    products: list[Product]
    collectives: list[Collective]
    slices: list[Slices]
    temporaries: list[str]
    """The largest results."""
    wide: dict[str, int]
    """64-bit types -> instructions."""
    unusual: dict[str, int]
    """Kinds that are not known, and dynamic shapes."""
    findings: list[Finding]
    cost: Cost
    """Of one execution, on paper."""

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products)

    @property
    def collective_bytes(self) -> int:
        return sum(each.nbytes * each.count for each in self.collectives)


def report(graph: TracedGraph, device: Device, *, low_precision: bool) -> GraphReport:
    """Read one graph. ``low_precision``: whether the run computes in bf16. Raises HloError."""
    module = parse(graph.hlo)
    pairs = [(c, i) for c in module.computations() for i in c.instructions]
    products, slices = _products(pairs), _slices(pairs)
    collectives = _collectives(pairs)
    return GraphReport(
        key=graph.key,
        name=graph.name,
        shapes=[list(shape) for shape in graph.shapes],
        instructions=len(pairs),
        kinds=dict(Counter(i.kind for _, i in pairs).most_common()),
        products=products,
        collectives=collectives,
        slices=slices,
        temporaries=_temporaries(pairs),
        wide=dict(Counter(s.dtype for _, i in pairs for s in i.shapes if s.dtype in ("f64", "s64", "u64"))),
        unusual=_unusual(pairs),
        findings=ranked(_findings(pairs, products, slices, collectives, low_precision)),
        cost=price(module, device),
    )


Pairs = Sequence[tuple[Computation, Instruction]]


def _grouped(
    pairs: Pairs, kinds: Iterable[str], form: Callable[[Computation, Instruction], Any]
) -> Counter[Any]:
    wanted = set(kinds)
    return Counter(form(c, i) for c, i in pairs if i.kind in wanted)


def _products(pairs: Pairs) -> list[Product]:
    def form(c: Computation, i: Instruction) -> tuple[Shape, Shape, Shape, int]:
        return i.shape, c.operand(i, 0).shape, c.operand(i, 1).shape, product_flops(c, i)

    found = []
    for (result, left, right, flops), count in _grouped(pairs, ["dot"], form).items():
        found.append(
            Product(
                shape=f"{result} = {left} x {right}",
                count=count,
                flops=flops * count,
                nbytes=(result.nbytes + left.nbytes + right.nbytes) * count,
                is_float32="f32" in (left.dtype, right.dtype),
            )
        )
    return sorted(found, key=lambda product: -product.flops)


def _collectives(pairs: Pairs) -> list[Collective]:
    def form(c: Computation, i: Instruction) -> tuple[str, str, int, int, str]:
        # torch_xla adds a scalar to each, which keeps them in order.
        given = [c.operand(i, n) for n in range(len(i.operands))]
        arrays = [s for s in i.shapes if s.elements > 1] or list(i.shapes[:1])
        most = max(sum(s.nbytes for s in arrays), sum(operand.nbytes for operand in given))
        return i.kind, " ".join(map(str, arrays[:3])), most, i.group_size, i.groups

    found = [
        Collective(kind, shape, count, nbytes, size, groups)
        for (kind, shape, nbytes, size, groups), count in _grouped(pairs, COLLECTIVES, form).items()
    ]
    return sorted(found, key=lambda each: -each.nbytes * each.count)


def _slices(pairs: Pairs) -> list[Slices]:
    def form(c: Computation, i: Instruction) -> tuple[str, str, int, int]:
        if i.kind == "gather":
            size = prod(i.numbers("slice_sizes"))
            return i.kind, str(c.operand(i, 0).shape), size, i.shape.elements // max(1, size)
        updates = c.operand(i, 2).shape
        size = prod(updates.dims[dim] for dim in i.numbers("update_window_dims"))
        return i.kind, str(i.shape), size, updates.elements // max(1, size)

    found = [
        Slices(kind, shape, size, slices, count)
        for (kind, shape, size, slices), count in _grouped(pairs, SLICES, form).items()
    ]
    return sorted(found, key=lambda each: (each.slice_elements != 1, -each.slices * each.count))


def _temporaries(pairs: Pairs, most: int = 8) -> list[str]:
    sizes = Counter((i.shape, i.kind) for _, i in pairs if i.kind not in _NO_TEMPORARIES and i.shapes)
    largest = sorted(sizes, key=lambda each: -each[0].nbytes)[:most]
    return [
        f"{size_in_words(shape.nbytes)} {kind} {shape}, {sizes[shape, kind]} times" for shape, kind in largest
    ]


def _unusual(pairs: Pairs) -> dict[str, int]:
    found = Counter(_kind(i) for _, i in pairs if i.kind not in KNOWN_KINDS and _kind(i) not in KNOWN_CALLS)
    found["dynamic shape"] = sum(any(s.dynamic for s in i.shapes) for _, i in pairs)
    return {kind: count for kind, count in found.items() if count}


def _kind(instruction: Instruction) -> str:
    """With the name of what a custom call calls."""
    if instruction.kind != "custom-call":
        return instruction.kind
    target = instruction.attributes.partition('custom_call_target="')[2].partition('"')[0]
    return f"custom-call {target}"


# Findings


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Those that cost most first, and what costs the same as it was found."""
    return sorted(findings, key=lambda finding: -finding.cost)


def _findings(
    pairs: Pairs,
    products: Sequence[Product],
    slices: Sequence[Slices],
    collectives: Sequence[Collective],
    low_precision: bool,
) -> Iterator[Finding]:
    for each in slices:
        if each.single and each.slices >= MANY_SLICES:
            yield Finding(
                "single elements",
                f"{each.kind} of {each.slices:,} single elements of {each.shape}, {each.count} times",
                "index rows (index_select) instead of elements (gather, take_along_dim)",
                each.slices * each.count,
            )
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
    yield from _values(pairs)
    for collective in collectives:
        if collective.shape.startswith(("s", "u", "pred")):
            yield Finding(
                "integer collectives",
                f"{collective.kind} of {collective.shape}, {collective.count} times",
                "reduce floats, or exchange integers on the host",
                collective.nbytes * collective.count,
            )
    unusual = _unusual(pairs)
    for kind, count in unusual.items():
        yield Finding(
            "kinds", f"{kind}, {count} times", "see whether neuronx-cc compiles it; docs/graphs.md", count
        )


def _values(pairs: Pairs) -> Iterator[Finding]:
    """Instructions by the values that they compute with."""
    double = [i for _, i in pairs if any(s.dtype == "f64" for s in i.shapes)]
    if double:
        yield Finding(
            "64-bit floats",
            f"{len(double)} instructions, the first a {double[0].kind} of {double[0].shape}",
            "a Python number became one: keep such settings in float32 tensors (training/adamw.py)",
            sum(i.nbytes for i in double),
        )
    powers = [i for c, i in pairs if i.kind == "power" and c.source(c.operand(i, 1)).kind != "constant"]
    if powers:
        yield Finding(
            "powers",
            f"{len(powers)} powers with a tensor as exponent, the first of {powers[0].shape}",
            "b ** t = exp(t ln b) (training/adamw.py)",
            sum(i.nbytes for i in powers),
        )
    floors = [i for c, i in pairs if i.kind == "floor" and _divides_integers(c, c.operand(i, 0))]
    rests = [i for _, i in pairs if i.kind in ("remainder", "divide") and i.shape.dtype in ("s64", "u64")]
    if floors or rests:
        first = (floors + rests)[0]
        yield Finding(
            "integer divisions",
            f"{len(floors)} floor divisions of integers through floats, {len(rests)} divisions or remainders "
            f"of 64 bits, the first of {first.shape}",
            "work them out on the host, where the rows are laid (data/collate.py)",
            sum(i.nbytes for i in floors + rests),
        )


def _divides_integers(c: Computation, instruction: Instruction) -> bool:
    if instruction.kind != "divide":
        return False
    return any(c.source(c.operand(instruction, n)).shape.dtype[0] in "su" for n in (0, 1))


# For people and programs


def to_dict(
    rank: int, reports: Sequence[GraphReport], steps: Sequence[StepCost], device: Device
) -> dict[str, Any]:
    """Plain values, for JSON; costs in seconds."""
    return {
        "rank": rank,
        "graphs": [asdict(each) for each in reports],
        "device": device.name,
        "steps": [asdict(each) | each.totals(device) for each in steps],
    }


def to_text(rank: int, reports: Sequence[GraphReport], steps: Sequence[StepCost], device: Device) -> str:
    """Tables, a graph after the other, what a step takes on paper, and all findings at the end."""
    lines = [f"rank {rank}: {len(reports)} graphs, {sum(r.instructions for r in reports):,} instructions"]
    for number, each in enumerate(reports, 1):
        lines += ["", f"{number}. {each.name}, {_micro_batches(each)}", *_table(each)]
    return "\n".join([*lines, "", *_prices(steps, device), "", *_all_findings(reports)])


def _prices(steps: Sequence[StepCost], device: Device) -> Iterator[str]:
    yield f"a step on paper ({device.name}; a lower or an upper bound, to compare by: docs/graphs.md)"
    for each in steps:
        shape, totals = " x ".join(map(str, each.shape[:2])), each.totals(device)
        yield (
            f"  rows of {shape}: {each.micro_batches} micro-batches of {_ms(each.later.seconds)}, optimizer "
            f"{_ms(each.optimizer.seconds)}: {totals['seconds']:.3f} s for {each.examples} examples, "
            f"{totals['examples_per_second']:.2f} per second"
        )
        if each.stages > 1:
            yield f"    of which it waits for the other stages {_ms(each.waiting.seconds)}"
        yield (
            f"    {totals['products']:.0%} products, {totals['memory']:.0%} memory, "
            f"{totals['collectives']:.0%} collectives; {totals['peak']:.0%} of the bf16 rate"
        )


def _micro_batches(each: GraphReport) -> str:
    if not each.shapes:
        return "of no micro-batch"
    return "rows x tokens, response tokens, responses: " + "; ".join(
        f"{rows} x {tokens}, {labels}, {slots}" for rows, tokens, labels, slots in each.shapes
    )


def _table(each: GraphReport, most: int = 6) -> Iterator[str]:
    kinds = ", ".join(f"{kind} {count}" for kind, count in list(each.kinds.items())[:12])
    yield f"   hash          {each.key}"
    yield f"   instructions  {each.instructions:,}: {kinds}"
    yield (
        f"   on paper      {_ms(each.cost.seconds)}: products {_ms(each.cost.products)}, memory "
        f"{_ms(each.cost.memory)}, collectives {_ms(each.cost.collectives)}"
    )
    yield f"   products      {each.flops / 1e9:,.1f} GFLOP"
    for product in each.products[:most]:
        yield (
            f"     {product.count:>5} x {product.shape}: {product.flops / 1e9:,.1f} GFLOP, "
            f"{size_in_words(product.nbytes)}"
        )
    yield f"   collectives   {size_in_words(each.collective_bytes)}"
    for c in each.collectives[:most]:
        size = size_in_words(c.nbytes)
        yield f"     {c.count:>5} x {c.kind} {c.shape}: {size} each, over {c.group_size} ranks"
    yield "   gathers and scatters"
    for s in [s for s in each.slices if s.slices > 1][:most]:
        mark = ", SINGLE ELEMENTS" if s.single else ""
        yield f"     {s.count:>5} x {s.kind} {s.shape}: {s.slices:,} slices of {s.slice_elements:,}{mark}"
    yield "   largest temporaries"
    for temporary in each.temporaries[:most]:
        yield f"           {temporary}"
    if each.wide:
        yield "   64-bit values " + ", ".join(f"{dtype}: {count}" for dtype, count in each.wide.items())
    if each.unusual:
        yield "   unusual       " + ", ".join(f"{kind}: {count}" for kind, count in each.unusual.items())


def _all_findings(reports: Sequence[GraphReport]) -> Iterator[str]:
    found = [(finding, number) for number, r in enumerate(reports, 1) for finding in r.findings]
    if not found:
        yield "findings: none"
        return
    yield "findings"
    places: dict[Finding, list[int]] = {}
    for finding, number in found:
        places.setdefault(finding, []).append(number)
    for finding in ranked(places):
        where = ", ".join(map(str, places[finding]))
        yield f"  {finding.rule} (graph {where}): {finding.what}; {finding.advice}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def size_in_words(count: int) -> str:
    """Of bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"
