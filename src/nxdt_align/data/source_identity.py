"""What tells whether a data file is still the one whose tokens are stored, without reading all of it.

Size, time of the last change and a sample of the content are trusted together. Where the time or the name is
another, or on demand, all of the content is hashed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

BLOCKS, BLOCK = 16, 4096
"""Pieces of a file that are sampled, from its beginning to its end, and their bytes."""


@dataclass(frozen=True)
class Stamp:
    """A source as it was at one time."""

    path: str
    size: int
    """Bytes."""
    time: int
    """Of the last change of any of its files, in nanoseconds."""
    sample: str
    """Of its content; hex."""

    @classmethod
    def of(cls, path: str) -> Stamp | None:
        """None for what is no file or folder here. Raises OSError."""
        files = files_of(path)
        if not files:
            return None
        digest, size, time = hashlib.blake2b(digest_size=16), 0, 0
        for file in files:
            found = file.stat()
            size, time = size + found.st_size, max(time, found.st_mtime_ns)
            digest.update(_heading(file, files, found.st_size))
            with open(file, "rb") as content:
                for index in range(BLOCKS):
                    content.seek((found.st_size - BLOCK) * index // (BLOCKS - 1) if index else 0, os.SEEK_SET)
                    digest.update(content.read(BLOCK))
                    if found.st_size <= BLOCK:
                        break
        return cls(os.path.abspath(Path(path).expanduser()), size, time, digest.hexdigest())

    @cached_property
    def whole(self) -> str:
        """The hash of all of its content, hex; reads it. Raises OSError."""
        digest = hashlib.blake2b(digest_size=16)
        files = files_of(self.path)
        for file in files:
            digest.update(_heading(file, files, file.stat().st_size))
            with open(file, "rb") as content:
                while piece := content.read(2**22):
                    digest.update(piece)
        return digest.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _heading(file: Path, files: list[Path], size: int) -> bytes:
    """The name of a single file does not count: it may be moved."""
    return f"{file.name if len(files) > 1 else ''} {size}\n".encode(errors="surrogateescape")


def files_of(path: str) -> list[Path]:
    """The files of a source; none for the id of a data set, or what does not exist."""
    try:
        place = Path(path).expanduser()
        if place.is_file():
            return [place]
        return sorted(file for file in place.rglob("*") if file.is_file())
    except (OSError, ValueError, RuntimeError):
        return []  # what reads the source says why
