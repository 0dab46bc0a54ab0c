"""Compiling ahead of time (``COMPILE=1``): neuron_parallel_compile's totals, and manifests of graphs.

neuron_parallel_compile documents no return codes, so its last log lines are parsed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write

FORMAT = "nxdt-align graph manifest 1"
XLA = "torch_xla"
SHAPE = ["rows", "tokens", "response tokens", "responses"]
"""The meaning of the numbers of a micro-batch's shape."""
_TOTAL = re.compile(r"Total (graphs|successful compilations|failed compilations): *(\d+)")


class CompileError(UserError):
    """Graphs were not compiled ahead, so the run would compile them step by step."""


@dataclass(frozen=True)
class Totals:
    """What was compiled ahead."""

    graphs: int
    successful: int
    failed: int

    def __str__(self) -> str:
        """neuron_parallel_compile's three lines."""
        return (
            f"Total graphs: {self.graphs}\n"
            f"Total successful compilations: {self.successful}\n"
            f"Total failed compilations: {self.failed}"
        )

    def require_success(self, compiler: str) -> None:
        """Raise CompileError if a compilation failed or there was none."""
        if self.failed:
            raise CompileError(
                f"COMPILE=1: {self.failed} of {self.graphs} graphs did not compile, so the run would stop at "
                f"them; {compiler} says above which and why"
            )
        if self.graphs == 0:
            raise CompileError(
                f"COMPILE=1: {compiler} found no graph to compile, so the dry-run steps did not reach the "
                "device; the lines above say what stopped them"
            )


def read_totals(lines: Iterable[str]) -> Totals | None:
    """The last totals in a log; None where one of the three is missing."""
    found = {match[1]: int(match[2]) for line in lines for match in _TOTAL.finditer(line)}
    if len(found) < 3:
        return None
    return Totals(found["graphs"], found["successful compilations"], found["failed compilations"])


def precompile(command: Sequence[str]) -> Totals:
    """Run neuron_parallel_compile, its output handed on line by line.

    ``command``: its program and all arguments. Raises CompileError where it cannot be started, prints no
    totals or ends with a fault, and where a compilation failed or there was none.
    """
    compiler = Path(command[0]).name
    totals, status = _run(command)
    if totals is None:
        raise CompileError(
            f"COMPILE=1: {compiler} ended with status {status} and without its totals, so nothing is "
            "known to be compiled; the lines above say why"
        )
    totals.require_success(compiler)
    if status:
        raise CompileError(
            f"COMPILE=1: {compiler} compiled {totals.successful} graphs but ended with status {status}, so "
            "the dry-run steps may not have finished; the lines above say why"
        )
    return totals


def _run(command: Sequence[str]) -> tuple[Totals | None, int]:
    lines = []
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise CompileError(f"COMPILE=1: {command[0]} cannot be started: {error.strerror}") from error
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if _TOTAL.search(line):
                lines.append(line)
    return read_totals(lines), process.returncode


class Graph(Protocol):
    """A graph as listed in a manifest."""

    @property
    def key(self) -> str:
        """The same for the same graph in every process."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def shapes(self) -> Sequence[Sequence[int]]:
        """One per micro-batch, see SHAPE."""
        ...


Step = tuple[str, tuple[tuple[int, ...], ...]]
"""What was computed, and the shapes of its micro-batches."""


def write_manifest(
    path: Path,
    graphs: Iterable[Graph],
    about: Mapping[str, str],
    steps: Iterable[Step] = (),
    *,
    compiler: str = XLA,
) -> None:
    """Write hash, name and shapes of each graph as JSON, atomically.

    Args:
        about: what they belong to.
        steps: those that were taken, also where a step needed no graph beyond those of others.
        compiler: what compiled them; the hashes of others are not comparable.
    """
    entries = [
        {"hash": graph.key, "name": graph.name, "shapes": [list(shape) for shape in graph.shapes]}
        for graph in graphs
    ]
    taken = [{"name": name, "shapes": shapes} for name, shapes in steps]
    content = {
        "format": FORMAT,
        "compiler": compiler,
        **about,
        "shape": SHAPE,
        "graphs": entries,
        "steps": taken,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1).encode() + b"\n")


def read_manifest(path: Path, compiler: str = XLA) -> set[str] | None:
    """The hashes of a manifest's graphs; None where there is no file, or one of another compiler's graphs.
    Raises CompileError for any other file."""
    return _read(path, compiler, lambda content: {str(entry["hash"]) for entry in content["graphs"]})


def read_steps(path: Path, compiler: str = XLA) -> set[Step] | None:
    """The steps that a manifest's graphs are enough for; None where there is no file, or one of another
    compiler's graphs, or of an earlier version. Raises CompileError for any other file."""

    def steps_of(content: Any) -> set[Step] | None:
        if "steps" not in content:
            return None
        return {(str(step["name"]), tuple(map(tuple, step["shapes"]))) for step in content["steps"]}

    return _read(path, compiler, steps_of)


T = TypeVar("T")


def _read(path: Path, compiler: str, part: Callable[[Any], T]) -> T | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        # The first manifests did not say, as there was one compiler.
        return part(content) if content.get("compiler", XLA) == compiler else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CompileError(
            f"{path} is not a manifest of compiled graphs ({error}); remove it, or rewrite it with COMPILE=1"
        ) from error
