"""Which of a checkpoint's files a rank compares, and the checksums within torch's own files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from typing import Any


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
