"""Checksums of a converted checkpoint's files, in its ``conversion.json``, which NxD ignores.

A changed bit in a shard is another model, and neither torch nor NxD looks for it. Each file has the CRC-32 of
every share of a weight in it, and of all bytes beside them. These are the pieces that are written and read
anyway, so that comparing them takes no further pass over the disk, as digests of whole files would, and names
the file. CRC-32 finds every accident; it is no protection from someone who wants to deceive.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nxdt_align.checksums import crc32_of, crc32_of_record
from nxdt_align.weights.extents import WeightsError, byte_view

RECORD = "conversion.json"
"""The source of a converted checkpoint, the checksums of its weights and of its files."""
_FILES, _SELF = "files", "checksum"
_CONFIG = "config.json"
_CHECKED_AT_USE = (_CONFIG, "generation_config.json")
"""``require_unchanged`` checks them: a user may name others."""


@dataclass
class FileDigest:
    """One file: its size, the checksum of each part, and that of all bytes outside of them."""

    size: int
    rest: int
    parts: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Offset -> bytes and CRC-32."""

    @classmethod
    def of(cls, path: Path, parts: Mapping[int, tuple[int, int]] | None = None) -> FileDigest:
        """Reads only what is in no part. Raises OSError."""
        size = path.stat().st_size
        ordered = dict(sorted((parts or {}).items()))
        return cls(size, crc32_of(path, _gaps(size, ordered)), ordered)

    def to_json(self) -> dict[str, Any]:
        parts = " ".join(f"{offset}+{size}:{crc:08x}" for offset, (size, crc) in self.parts.items())
        return {"bytes": self.size, "rest": f"{self.rest:08x}"} | ({"parts": parts} if parts else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FileDigest:
        parts = {}
        for part in str(values.get("parts", "")).split():
            place, _, crc = part.partition(":")
            offset, _, size = place.partition("+")
            parts[int(offset)] = int(size), int(crc, 16)
        return cls(int(values["bytes"]), int(values["rest"], 16), parts)


class Digests:
    """What ``conversion.json`` in ``folder`` says of the files there, by their names in it."""

    def __init__(self, folder: Path, files: Mapping[str, FileDigest]) -> None:
        self._folder = folder
        self._files = {folder / name: digest for name, digest in files.items()}

    @classmethod
    def read(cls, folder: Path) -> Digests | None:
        """None where there is no record, or one of a version that kept no checksums of files.

        Raises WeightsError if it is damaged.
        """
        file = folder / RECORD
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if _FILES not in record and _SELF not in record:
                return None
            if record.pop(_SELF, None) != crc32_of_record(record):
                raise ValueError("its own checksum is another")
            return cls(folder, {name: FileDigest.from_json(x) for name, x in record[_FILES].items()})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise WeightsError(
                f"{file} is damaged ({error}): copy the checkpoint again, or remove this file to read the "
                "weights without comparing checksums"
            ) from error

    def check_beside_parts(self) -> None:
        """Compare the sizes of all files but those that may be read from elsewhere, and what they hold beside
        weights. Raises WeightsError."""
        lost = [path for path in self._files if path.parent != self._folder and not path.is_file()]
        missing = [str(path.relative_to(self._folder)) for path in lost]
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise WeightsError(
                f"{self._folder} has lost files that {RECORD} names, {', '.join(missing[:4])}{more}: copy "
                "the checkpoint again"
            )
        for path, digest in self._files.items():
            if path.name not in _CHECKED_AT_USE and path.is_file():
                self._check_rest(path, digest)

    def check_file(self, path: Path) -> None:
        """Compare one whole file, if it is a listed one. Raises WeightsError."""
        digest = self._files.get(path)
        if digest is not None:
            self._check_rest(path, digest)
            self._check_parts(path, digest.parts)

    def check_parts_but(self, read: Iterable[tuple[Path, int, int]]) -> None:
        """Compare the parts that are none of ``read`` (file, offset, bytes)."""
        met = set(read)
        for path, digest in self._files.items():
            self._check_parts(path, [o for o, (n, _) in digest.parts.items() if (path, o, n) not in met])

    def _check_rest(self, path: Path, digest: FileDigest) -> None:
        self._require(path, path.stat().st_size == digest.size)
        self._require(path, _read_checksum(path, _gaps(digest.size, digest.parts)) == digest.rest)

    def _check_parts(self, path: Path, offsets: Iterable[int]) -> None:
        for offset in offsets:
            size, crc = self._files[path].parts[offset]
            self._require(path, _read_checksum(path, [(offset, size)]) == crc)

    def check(self, path: Path, offset: int, held: Tensor) -> None:
        """Compare a contiguous tensor that was read from ``offset`` on, if it is a part. Raises
        WeightsError."""
        digest = self._files.get(path)
        size, crc = (0, 0) if digest is None else digest.parts.get(offset, (0, 0))
        if size and size == held.nbytes:
            self._require(path, zlib.crc32(byte_view(held)) == crc)

    def _require(self, path: Path, is_same: bool) -> None:
        if not is_same:
            advice = f"remove {RECORD}, and nothing is compared"
            if path.name == _CONFIG:
                advice = f"give it with --config, or {advice}"
            own = f"; if you have changed it yourself, {advice}" if path.suffix == ".json" else ""
            raise WeightsError(
                f"{path} is damaged: it has changed since it was written, by its checksum in {RECORD}. Copy "
                f"or convert the checkpoint again{own}"
            )


def require_unchanged(file: Path) -> None:
    """Compare a file with the record beside it, if there is one that names it. Raises WeightsError."""
    digests = Digests.read(file.parent)
    if digests is not None:
        digests.check_file(file)


def write_record(folder: Path, record: Mapping[str, Any], files: Mapping[str, FileDigest]) -> None:
    """Write ``record`` with the checksums of ``files``, and one of its own. Raises OSError."""
    whole = {**record, _FILES: {name: digest.to_json() for name, digest in sorted(files.items())}}
    text = json.dumps(whole | {_SELF: crc32_of_record(whole)}, indent=2) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def _gaps(size: int, parts: Mapping[int, tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Offset and bytes of what lies in no part; ``parts`` are sorted."""
    start = 0
    for offset, (count, _) in parts.items():
        if offset > start:
            yield start, offset - start
        start = max(start, offset + count)
    if size > start:
        yield start, size - start


def _read_checksum(path: Path, pieces: Iterable[tuple[int, int]]) -> int:
    try:
        return crc32_of(path, pieces)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
