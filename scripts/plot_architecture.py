#!/usr/bin/env python3
"""Draws the rooms of the package and who imports whom, from the package's own imports.

scripts/plot_architecture.py [--out docs/architecture.svg]
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "src" / "nxdt_align"
WIDTH, HEIGHT = 980, 640
TALL = 62


@dataclass(frozen=True)
class Room:
    """A box: modules whose names begin so, and where it stands (pixels)."""

    name: str
    holds: str
    left: int
    top: int
    width: int
    colour: str

    @property
    def middle(self) -> int:
        return self.left + self.width // 2


TOP, PARTS, SPREAD, MATHS, BASE = "#e8e8e8", "#dbe7f5", "#f8e3cf", "#dcefdc", "#f3f3f3"
ROOMS = (
    Room("cli, api", "argv or Python -> a verb", 20, 16, 940, TOP),
    Room("run", "configuration -> objects -> a run; resuming, dry runs, export", 20, 108, 940, TOP),
    Room("training", "Lightning module, hooks", 20, 220, 220, PARTS),
    Room("reference", "reference pass, store", 260, 220, 220, PARTS),
    Room("planning", "rows, graphs, memory", 570, 220, 200, PARTS),
    Room("evaluation", "answers, reports", 790, 220, 170, PARTS),
    Room("neuron", "environment", 20, 340, 130, SPREAD),
    Room("engines.native", "FSDP2, DTensor", 160, 340, 130, SPREAD),
    Room("engines", "steps, checkpoints", 306, 340, 128, SPREAD),
    Room("engines.nxd", "NxD, torch_xla", 450, 340, 130, SPREAD),
    Room("weights", "readers, writers", 716, 340, 126, SPREAD),
    Room("data", "records, rows", 856, 340, 104, SPREAD),
    Room("losses", "pure functions of log-probabilities", 20, 456, 270, MATHS),
    Room("models", "plain PyTorch decoder", 470, 456, 170, MATHS),
    Room("ops", "attention", 660, 456, 120, MATHS),
    Room("config", "the schema: each key's type, default, rule and meaning", 20, 556, 620, BASE),
    Room("batch, files, ...", "what all have", 660, 556, 300, BASE),
)
FREE = ("cli, api", "run", "config", "batch, files, ...")
"""Rooms without arrows: the two at the top import all others, the two at the foot are imported by most."""


def room_of(module: str) -> str:
    """The box that a module stands in: the longest name that it begins with."""
    names = sorted((room.name for room in ROOMS), key=len, reverse=True)
    for name in names:
        if module == name or module.startswith(f"{name}."):
            return name
    is_top = module.split(".")[0] in ("api", "__main__", "__init__") or module.startswith("cli")
    return "cli, api" if is_top else "batch, files, ..."


@cache
def arrows() -> list[tuple[str, str]]:
    """(importer, imported) of different rooms, those of FREE left out."""
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
    }
    found = {(room_of(name), room_of(other)) for name, path in files.items() for other in _imports(path)}
    return sorted((a, b) for a, b in found if a != b and a not in FREE and b not in FREE)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            inner = (node.module or "").partition(".")[2]
            yield from (f"{inner}.{alias.name}".strip(".") for alias in node.names)


def drawing() -> str:
    rooms = {room.name: room for room in ROOMS}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" role="img">',
        "<title>Rooms of nxdt_align, and who imports whom</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    pairs = [*arrows(), ("cli, api", "run")]
    lines += [_arrow(rooms[a], rooms[b]) for a, b in pairs]
    for room in ROOMS:
        lines += _box(room)
    notes = (
        (200, "run imports, and puts together, every room below"),
        (HEIGHT - 8, "most rooms import these two"),
    )
    lines += [
        f'<text x="{WIDTH // 2}" y="{y}" text-anchor="middle" fill="#555">{note}</text>' for y, note in notes
    ]
    return "\n".join([*lines, "</svg>", ""])


def _arrow(a: Room, b: Room) -> str:
    if a.top == b.top:
        start, end = (a.left + a.width, b.left) if a.left < b.left else (a.left, b.left + b.width)
        points = (start, a.top + TALL // 2, end, b.top + TALL // 2)
    else:
        points = (a.middle, a.top + TALL, b.middle, b.top)
    x1, y1, x2, y2 = points
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#555" stroke-width="1.2" '
        'marker-end="url(#head)"/>'
    )


def _box(room: Room) -> Iterator[str]:
    yield (
        f'<rect x="{room.left}" y="{room.top}" width="{room.width}" height="{TALL}" rx="6" '
        f'fill="{room.colour}" stroke="#888"/>'
    )
    for below, text, style in ((26, room.name, ' font-weight="bold"'), (46, room.holds, ' font-size="12"')):
        place = f'x="{room.middle}" y="{room.top + below}" text-anchor="middle"'
        yield f"<text {place}{style}>{escape(text)}</text>"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the rooms of the package.")
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "architecture.svg")
    parser.parse_args().out.write_text(drawing(), encoding="utf-8")


if __name__ == "__main__":
    main()
