"""Tokens of many records in a few flat arrays, and the file that keeps them: mapped, not read.

The file is NumPy's ``.npz``, uncompressed, its arrays at multiples of 64 bytes: every process of a machine
maps the same pages of memory, and reads of them only what a step needs.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from nxdt_align.data.records import BadRecord
from nxdt_align.data.tokenize import Encoded, changed_id
from nxdt_align.files import atomic_file
from nxdt_align.record_ids import ID_BYTES, Array, as_bytes

REFUSED, UNREAD = "refused", "unread"
"""(R, 3) text, id, reason and detail of each record that has no tokens; (K, 2) text, keys of messages that
nothing reads and the number of records that have them."""
_LATER = ("changed", "whole_lengths")
"""Arrays that a file has only where they say anything."""
_ALIGNMENT = 64
_PADDING = 0xD935
"""The kind of a ZIP header's extra field that only pads, as Android's zipalign writes it."""
BROKEN = (OSError, ValueError, KeyError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)
"""What a damaged file raises. RuntimeError: a header that now asks for a password, or for a method that there
is none for."""


@dataclass(frozen=True)
class TokenColumns:
    """U records of k responses each. Tokens are concatenated; ``offsets[i]:offsets[i + 1]`` is the i-th."""

    ids: Array
    """(U, 16) uint8, content hashes, each once."""
    prompt_tokens: Array
    """int32"""
    prompt_offsets: Array
    """(U + 1,) int64"""
    response_tokens: Array
    """int32"""
    response_offsets: Array
    """(U * k + 1,) int64; a record's responses are neighbours."""
    truncated: Array
    """(U,) bool"""
    changed: Array
    """(U,) bool: an earlier version of the rules gave it other tokens."""
    whole_lengths: Array
    """(U, 1 + k) int32: tokens of the prompt and of the responses before truncation. (0, 1 + k) where nothing
    was truncated, or an earlier version did not note them."""
    prompt_lengths: Array
    """(U,) int32"""
    response_lengths: Array
    """(U, k) int32"""
    last_tokens: Array
    """(U, k) int32: of each response."""
    identical: Array
    """(U,) bool: the two responses of a pair are the same tokens. False where k is 1."""
    path: Path | None = field(default=None, compare=False)
    """The file that the arrays are mapped from."""

    @classmethod
    def of(cls, record_ids: Sequence[str], encoded: Sequence[Encoded]) -> TokenColumns:
        """The columns of U records of k responses each."""
        cut = any(each.truncated for each in encoded)
        prompt_tokens, prompt_offsets = _flat([each.prompt for each in encoded])
        response_tokens, response_offsets = _flat([tokens for each in encoded for tokens in each.responses])
        return cls.completed(
            ids=as_bytes(record_ids),
            prompt_tokens=prompt_tokens,
            prompt_offsets=prompt_offsets,
            response_tokens=response_tokens,
            response_offsets=response_offsets,
            truncated=np.array([each.truncated for each in encoded], dtype=bool),
            changed=np.array([each.changed for each in encoded], dtype=bool),
            whole_lengths=np.array([each.whole for each in encoded if cut], dtype=np.int32).reshape(
                -1, 1 + len(encoded[0].responses)
            ),
        )

    @classmethod
    def completed(cls, *, path: Path | None = None, **arrays: Array) -> TokenColumns:
        """The columns of these arrays and of those that follow from them, where they are not given."""
        if "prompt_lengths" not in arrays:
            k = (len(arrays["response_offsets"]) - 1) // len(arrays["ids"])
            lengths = np.diff(arrays["response_offsets"]).reshape(-1, k).astype(np.int32)
            arrays["prompt_lengths"] = np.diff(arrays["prompt_offsets"]).astype(np.int32)
            arrays["response_lengths"] = lengths
            ends = arrays["response_offsets"][1:].reshape(-1, k) - 1
            arrays["last_tokens"] = arrays["response_tokens"][ends]
            arrays["identical"] = _identical(arrays["response_tokens"], arrays["response_offsets"], lengths)
        return cls(path=path, **arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file anew, so that a data loader's workers hold no copy."""
        if self.path is not None:
            return _mapped_again, (self.path,)
        return _of_arrays, (self.arrays(),)

    def arrays(self) -> dict[str, Array]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}

    @property
    def responses_per_record(self) -> int:
        return int(self.response_lengths.shape[1])

    def prompt(self, row: int) -> Array:
        return self.prompt_tokens[self.prompt_offsets[row] : self.prompt_offsets[row + 1]]

    def responses(self, row: int) -> tuple[Array, ...]:
        k = self.responses_per_record
        bounds = self.response_offsets[row * k : (row + 1) * k + 1].tolist()
        return tuple(self.response_tokens[a:b] for a, b in pairwise(bounds))

    def lengths_before_truncation(self) -> Array:
        """(U, 1 + k), also where none was noted since nothing was cut."""
        if len(self.whole_lengths):
            return self.whole_lengths
        return np.concatenate([self.prompt_lengths[:, None], self.response_lengths], axis=1)

    def record_id(self, row: int) -> str:
        """The content's hash, hex; another for a record whose tokens later rules changed."""
        own = self.ids[row].tobytes().hex()
        return changed_id(own) if self.changed[row] else own

    def require_sound(self, *, whole: bool) -> None:
        """Raise ValueError where the arrays are inconsistent, which a file on disk may be. ``whole``: look at
        every offset."""
        count = len(self.ids)
        k = self.response_lengths.shape[1] if self.response_lengths.ndim == 2 else 0
        is_sound = (
            count > 0
            and self.ids.shape == (count, ID_BYTES)
            and self.truncated.shape == self.changed.shape == self.identical.shape == (count,)
            and len(self.whole_lengths) in (0, count)
            and k in (1, 2)
            and self.prompt_lengths.shape == (count,)
            and self.response_lengths.shape == self.last_tokens.shape == (count, k)
            and _fit(self.prompt_tokens, self.prompt_offsets, count, whole)
            and _fit(self.response_tokens, self.response_offsets, count * k, whole)
        )
        if not is_sound:
            raise ValueError("its arrays are inconsistent")


def _flat(sequences: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(tokens) for tokens in sequences], out=offsets[1:])
    flat = np.empty(int(offsets[-1]), np.int32)
    for (begin, end), tokens in zip(pairwise(offsets.tolist()), sequences, strict=True):
        flat[begin:end] = tokens
    return flat, offsets


def _fit(tokens: Array, offsets: Array, count: int, whole: bool) -> bool:
    if tokens.dtype != np.int32 or tokens.ndim != 1 or offsets.dtype != np.int64:
        return False
    ends = offsets.shape == (count + 1,) and offsets[0] == 0 and offsets[-1] == len(tokens)
    return bool(ends and (not whole or (np.diff(offsets) > 0).all()))


def _identical(tokens: Array, offsets: Array, lengths: Array) -> Array:
    result = np.zeros(len(lengths), dtype=bool)
    if lengths.shape[1] == 2:
        for row in np.flatnonzero(lengths[:, 0] == lengths[:, 1]).tolist():
            begin, middle, end = offsets[2 * row : 2 * row + 3].tolist()
            result[row] = np.array_equal(tokens[begin:middle], tokens[middle:end])
    return result


# The file


class TokenFile(NamedTuple):
    """What a file holds."""

    columns: TokenColumns
    refused: dict[str, BadRecord]
    """Why a record has no tokens, by its id."""
    unread: dict[str, int]
    """Keys of messages that nothing reads, and the number of records that have them."""


class Stream(NamedTuple):
    """An array that is written piece by piece."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]


def map_tokens(path: Path, *, trusted: bool) -> TokenFile:
    """The arrays of a file of this version or of an earlier one, which is read where it cannot be mapped.

    Args:
        trusted: the file is as it was written, so that its checksums need not be computed.

    Raises one of ``BROKEN`` for a file that is damaged.
    """
    arrays = _map_arrays(path, trusted)
    faults, keys = (arrays.pop(n).tolist() if n in arrays else [] for n in (REFUSED, UNREAD))
    names = arrays.pop("record_ids", None)
    if names is not None:  # an earlier version's
        arrays["ids"] = as_bytes(names.tolist())
    count = len(arrays["ids"])
    arrays.setdefault("changed", np.zeros(count, dtype=bool))
    arrays.setdefault("whole_lengths", np.zeros((0, 2), dtype=np.int32))
    known = {f.name for f in fields(TokenColumns)}
    if "prompt_lengths" not in arrays:
        _require_offsets(arrays, count)
    columns = TokenColumns.completed(path=path, **{n: a for n, a in arrays.items() if n in known})
    columns.require_sound(whole=not trusted)
    refused = {record: BadRecord(reason, detail) for record, reason, detail in faults}
    return TokenFile(columns, refused, {key: int(number) for key, number in keys})


def _require_offsets(arrays: Mapping[str, Array], count: int) -> None:
    """Of a file of an earlier version, before anything is computed with them."""
    k = (len(arrays["response_offsets"]) - 1) // count
    if not (
        k in (1, 2)
        and _fit(arrays["prompt_tokens"], arrays["prompt_offsets"], count, True)
        and _fit(arrays["response_tokens"], arrays["response_offsets"], count * k, True)
    ):
        raise ValueError("its arrays are inconsistent")


def write_tokens(
    path: Path,
    arrays: Mapping[str, Array | Stream],
    refused: Mapping[str, BadRecord],
    unread: Mapping[str, int],
) -> None:
    """Write atomically. Raises OSError."""
    kept: dict[str, Array | Stream] = {}
    for name, array in arrays.items():
        if name not in _LATER or not isinstance(array, np.ndarray) or array.any():
            kept[name] = array
    if refused:
        kept[REFUSED] = np.array([(record, f.reason, f.detail) for record, f in refused.items()])
    if unread:
        kept[UNREAD] = np.array([(key, str(count)) for key, count in unread.items()])
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in kept.items():
            _write_array(archive, name + ".npy", array)


def _write_array(archive: zipfile.ZipFile, name: str, array: Array | Stream) -> None:
    stream = (
        array
        if isinstance(array, Stream)
        else Stream(array.dtype, array.shape, lambda: [np.ascontiguousarray(array)])
    )
    info = zipfile.ZipInfo(name)
    # In front of the data: a header of 30 bytes, the name, this field and zipfile's 20 bytes for sizes.
    padding = -(archive.start_dir + 30 + len(name) + 4 + 20) % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as member:
        header = {
            "descr": np.lib.format.dtype_to_descr(stream.dtype),
            "fortran_order": False,
            "shape": stream.shape,
        }
        np.lib.format.write_array_header_1_0(member, header)
        for piece in stream.pieces():
            member.write(piece.tobytes())


def _map_arrays(path: Path, trusted: bool) -> dict[str, Array]:
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        if not trusted:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            info.filename.removesuffix(".npy"): _map_array(file, mapped, info) for info in archive.infolist()
        }


def _map_array(file: IO[bytes], mapped: mmap.mmap, info: zipfile.ZipInfo) -> Array:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"{info.filename} is compressed or encrypted")
    file.seek(info.header_offset)
    name, extra = struct.unpack("<26xHH", file.read(30))
    begin = info.header_offset + 30 + name + extra
    file.seek(begin)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    count, offset = int(np.prod(shape)), file.tell()
    if dtype.hasobject or is_fortran or offset + count * dtype.itemsize > begin + info.file_size:
        raise ValueError(f"{info.filename} does not hold what its header says")
    return np.frombuffer(mapped, dtype, count, offset).reshape(shape)


def _mapped_again(path: Path) -> TokenColumns:
    return map_tokens(path, trusted=True).columns


def _of_arrays(arrays: Mapping[str, Array]) -> TokenColumns:
    return TokenColumns(path=None, **arrays)


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes, and the time of the last change in nanoseconds."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
