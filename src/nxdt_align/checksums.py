"""CRC-32 of files and of JSON records: what tells that one has changed since it was written.

For accidents and not for attacks: it finds every changed stretch of up to 32 bits and misses one in four
billion of all others, and zlib computes it faster than a disk reads.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22
"""Bytes read at once: large enough for the disk, small enough for the processor's cache."""


def crc32_of(path: Path, pieces: Iterable[tuple[int, int]] | None = None) -> int:
    """Of the whole file, or of ``pieces`` of it (offset, bytes) one after the other, those beyond its end
    being empty. Raises OSError."""
    parts = [(0, path.stat().st_size)] if pieces is None else list(pieces)
    block = memoryview(bytearray(min(_BLOCK, max((size for _, size in parts), default=0))))
    value = 0
    with open(path, "rb", buffering=0) as file:
        for offset, size in parts:
            file.seek(offset)
            while size and (count := file.readinto(block[:size])):
                value, size = zlib.crc32(block[:count], value), size - count
    return value


def crc32_of_record(record: Mapping[str, Any]) -> str:
    """Of what JSON keeps of it, whatever the order of the keys and the white space: eight hexadecimal
    digits."""
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"
