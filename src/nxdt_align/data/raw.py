"""A record as its file has it, and what is said of files that hold something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nxdt_align.data.records import BadRecord

EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".arrow", ".parquet")
MAX_RECORD = 32 * 2**20
"""Bytes of a JSON record: far above any that can be trained on, far below what a machine cannot hold."""


@dataclass(frozen=True)
class RawRecord:
    """A record as its file has it."""

    place: str
    """``file:line``, or ``file:record N`` where the file has no lines."""
    value: Any
    fault: BadRecord | None = None


_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip data; name it with .gz at its end"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data; unpack it with unzstd"),
    (b"BZh", "bzip2 data; unpack it with bunzip2"),
    (b"\xfd7zXZ", "xz data; unpack it with unxz"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"PAR1", "Parquet data; name it .parquet"),
    (b"ARROW1", "Arrow data; name it .arrow"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does"),
    (b"\x00\x00\xfe\xff", "UTF-32 text; save it as UTF-8, as iconv -f UTF-32 -t UTF-8 does"),
    *((begin, "UTF-16 text; save it as UTF-8") for begin in (b"{\x00", b"[\x00", b"\x00{", b"\x00[")),
    (b"version https://git-lfs", "a Git LFS pointer, not the data; fetch them with git lfs pull"),
    *((begin, "a web page, not data; download the file itself") for begin in (b"<!", b"<html", b"<?xml")),
)


def other_content(beginning: bytes) -> str | None:
    """What a file that should hold JSON holds by its first bytes, and what to do; None if it may be JSON."""
    return next((told for begin, told in _BEGINNINGS if beginning.startswith(begin)), None)
