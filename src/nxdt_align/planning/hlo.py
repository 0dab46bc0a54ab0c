"""XLA's graphs as text (HLO), read into instructions.

``HloModule`` prints one instruction per line, ``%name = shape kind(operands), attribute=value, ...``, in
computations between braces; the one that starts with ENTRY is the graph, the others are what it calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "f8e4m3": 8,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
"""Type -> bits of a value."""
_TYPE = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:body|condition|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class HloError(ValueError):
    """A text that is no HLO as this reader knows it."""


@dataclass(frozen=True)
class Shape:
    """Of one array."""

    dtype: str
    """XLA's name of the type, such as bf16."""
    dims: tuple[int, ...]
    """For a dynamic dimension, its bound."""
    dynamic: bool = False

    @property
    def elements(self) -> int:
        return prod(self.dims)

    @property
    def nbytes(self) -> int:
        return (self.elements * BITS[self.dtype] + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One of a computation."""

    name: str
    kind: str
    """XLA's name of the operation, such as dot."""
    shapes: tuple[Shape, ...]
    """Of its result: several where that is a tuple."""
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    literal: str
    """What stands in the parentheses, for a constant or a parameter."""
    attributes: str

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def nbytes(self) -> int:
        return sum(shape.nbytes for shape in self.shapes)

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """An attribute such as ``slice_sizes={1,4096}``; () where it is missing."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    @property
    def groups(self) -> str:
        """``replica_groups`` of a collective, as XLA prints them."""
        found = re.search(
            r"replica_groups=(\{(?:\{[\d,]*\},?)*\}|\[[^\]]*\](?:<=\[[^\]]*\])?[^,]*)", self.attributes
        )
        return found[1] if found else ""

    @property
    def first_group(self) -> tuple[int, ...]:
        """Ranks of a collective's first group; () where the text does not list them."""
        found = re.match(r"\{\{([\d,]*)\}", self.groups)
        return tuple(int(rank) for rank in found[1].split(",")) if found and found[1] else ()

    @property
    def group_size(self) -> int:
        return len(self.first_group)


@dataclass(frozen=True)
class Computation:
    """Instructions in an order in which each comes after its operands."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {each.name: each for each in self.instructions}

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.by_name[instruction.operands[index]]

    def source(self, instruction: Instruction) -> Instruction:
        """Where a value comes from that was only given another shape or type on its way."""
        while instruction.kind in ("broadcast", "reshape", "convert", "bitcast", "copy", "transpose"):
            instruction = self.operand(instruction, 0)
        return instruction


@dataclass(frozen=True)
class HloModule:
    """A graph."""

    entry: Computation
    others: dict[str, Computation]
    """What it calls, by name: also the additions and maxima of reductions."""

    def computations(self) -> Iterator[Computation]:
        """The entry, and what runs as its loops, branches and calls; not what reduces two values to one."""
        waiting, seen = [self.entry], {self.entry.name}
        while waiting:
            present = waiting.pop()
            yield present
            for instruction in present.instructions:
                names = _CALLED.findall(instruction.attributes)
                if instruction.kind == "call":
                    names += re.findall(r"to_apply=%?([\w.\-]+)", instruction.attributes)
                for listed in _BRANCHES.findall(instruction.attributes):
                    names += [name.strip().removeprefix("%") for name in listed.split(",")]
                for name in names:
                    if name not in seen:
                        seen.add(name)
                        waiting.append(self.others[name])


def parse(text: str) -> HloModule:
    """Read a module's text. Raises HloError for a line that is none of its forms, or without an entry."""
    entry: Computation | None = None
    others: dict[str, Computation] = {}
    name, is_entry = "", False
    instructions: list[Instruction] | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if instructions is None:
            head = _HEAD.match(line)
            if head is not None:
                name, is_entry, instructions = head[2], bool(head[1]), []
            elif line and not line.startswith("HloModule"):
                raise HloError(f"line {number} starts no computation: {line[:120]}")
        elif line == "}" or line.startswith("}, "):
            computation = Computation(name, tuple(instructions))
            others[name] = computation
            entry = computation if is_entry else entry
            instructions = None
        elif line:
            instructions.append(_instruction(line, number))
    if entry is None:
        raise HloError("the text has no entry computation")
    return HloModule(entry, others)


def _instruction(line: str, number: int) -> Instruction:
    found = _INSTRUCTION.match(line)
    if found is None:
        raise HloError(f"line {number} is no instruction: {line[:120]}")
    rest = found[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    at = rest.find("(")
    if end <= 0 or at <= 0:
        raise HloError(f"line {number} is no instruction: {line[:120]}")
    close = _closing(rest, at)
    inside = rest[at + 1 : close]
    is_literal = rest[:at] in ("constant", "parameter", "iota")
    return Instruction(
        name=found[2],
        kind=rest[:at],
        shapes=tuple(_shapes(shape, number)),
        operands=() if is_literal else tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside if is_literal else "",
        attributes=rest[close + 1 :].lstrip(", "),
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens at ``start``; a string's own do not count."""
    depth, quoted = 0, False
    for at in range(start, len(text)):
        character = text[at]
        if character == '"' and text[at - 1] != "\\":
            quoted = not quoted
        elif not quoted and character == "(":
            depth += 1
        elif not quoted and character == ")":
            depth -= 1
            if depth == 0:
                return at
    raise HloError(f"a parenthesis is not closed: {text[:120]}")


def _shapes(text: str, number: int) -> Iterator[Shape]:
    if not _TYPE.search(text) and "token" not in text and text != "()":
        raise HloError(f"line {number} has no shape: {text[:120]}")
    for dtype, dims in _TYPE.findall(text):
        if dtype not in BITS:
            raise HloError(f"line {number} has an unknown type: {dtype}")
        bounds = [dim.strip().removeprefix("<=") for dim in dims.split(",") if dim.strip()]
        yield Shape(dtype, tuple(map(int, bounds)), dynamic="<=" in dims)
