"""What can happen to a file, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def junk(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "halved": halve,
    "empty": lambda path: path.write_bytes(b""),
    "first byte": lambda path: flip(path, 0),
    "middle byte": flip,
    "last byte": lambda path: flip(path, 1),
    "gone": Path.unlink,
    "junk": junk,
    "nested": lambda path: path.write_text("[" * 100_000),
    "null": lambda path: path.write_text("null"),
}
