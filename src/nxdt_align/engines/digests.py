"""Checksums of a checkpoint's files: what tells that one has changed since it was written.

CRC-32, for accidents and not for attacks: it finds every changed stretch of up to 32 bits and misses one in
four billion of all others, and zlib computes it faster than a disk reads.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22
"""Bytes read at once: large enough for the disk, small enough for the processor's cache."""


def crc32_of(path: Path) -> str:
    """Eight hexadecimal digits. Raises OSError."""
    value, block = 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            value = zlib.crc32(block[:count], value)
    return f"{value:08x}"


def share(sizes: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """The files that this rank reads, so that all are read and each has about as many bytes.

    Args:
        sizes: file -> bytes; the same on every rank.
    """
    loads = [0] * ranks
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == rank:
            mine.append(name)
    return mine


def check_archive(file: Any) -> None:
    """Compare the checksums in a file of torch.save, which torch itself does not when it reads.

    Raises ValueError naming the record that differs, or for what is no such file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    # A damaged header may name a method or a password that there is none for (RuntimeError).
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"it is no archive of torch.save: {error}") from error
    if wrong is not None:
        raise ValueError(
            f"the checksum of its record {wrong} is wrong: bits have changed since it was written"
        )
