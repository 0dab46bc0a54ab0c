"""The reference store: log-probabilities on disk, one entry per record, under a fingerprint of their inputs.

A value belongs to a record's content, not to a position, so order, data-parallel size, restarts and epochs
cannot mix values up. Layout::

    <root>/<fingerprint>/store.json                    what the fingerprint was made from
    <root>/<fingerprint>/part-NNNNN-XXXXXXXX.safetensors   ids (n, 16) uint8, values (n, width) float32
    <root>/<fingerprint>/tables/<data set>.npy         the values of a whole data set, in its order

A part is written once, atomically, with a digest of its content. Parts are only added, under unique names, so
that two runs can share a store. No process holds all values: parts are read one after the other, and tables
are mapped.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write, explain
from nxdt_align.record_ids import ID_BYTES, Array, IdIndex, distinct
from nxdt_align.reference.parts import (
    DAMAGED,
    FORMAT,
    PATTERN,
    FloatArray,
    Part,
    part_bytes,
    part_number,
    read_part,
)
from nxdt_align.reference.table import AbsentError, find_table, write_table

ABOUT = "store.json"


class ReferenceStoreError(UserError):
    """Reference values that cannot be stored, read or trusted."""


def fingerprint_of(parts: Mapping[str, str]) -> str:
    """32 hex digits that change with any input of a reference log-probability.

    Args:
        parts: what the values depend on, each as text: digests of the weights, tokenizer and model
            config, the chat template, truncation, compute dtype, precision.
    """
    if not parts:
        raise ValueError("a fingerprint needs at least one part")
    for name, value in parts.items():
        if not isinstance(value, str):
            raise TypeError(f"fingerprint part {name!r} must be text, but is {type(value).__name__}")
    canonical = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"))
    return blake2b(canonical.encode(), digest_size=16).hexdigest()


def require_finite(ids: Array, values: FloatArray) -> None:
    """Raise ReferenceStoreError, naming the record, where a value is NaN or infinite."""
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        first = int(bad.argmax())
        raise ReferenceStoreError(
            f"the reference log-probabilities of {int(bad.sum())} record(s) are not finite, first record "
            f"{name_of(ids[first])}: {values[first].tolist()}. Check the reference's weights and the "
            "precision (fp32 rules out overflow)"
        )


def name_of(record_id: Array) -> str:
    """A record's id, (16,) uint8, for a message: 32 hex digits."""
    return record_id.tobytes().hex()


class ReferenceStore:
    """The values of one fingerprint: ``width`` float32 numbers per record, in nats.

    Independent of process groups: one process (rank 0) owns it. ``add`` buffers; ``flush`` writes. Ids are
    arrays, (n, 16) uint8.

    Args:
        root: folder of all stores.
        fingerprint: of everything the values depend on; see ``fingerprint_of``.
        width: 2 for pairs (chosen, rejected), 1 for single responses.
        description: the fingerprint's parts, stored as ``store.json`` for humans.
        read_only: never write; ``add`` then raises RuntimeError, or ignores its arguments with
            ``ignore_adds``, for graph extraction, where every value is zero.
    """

    def __init__(
        self,
        root: Path,
        fingerprint: str,
        width: int,
        *,
        description: Mapping[str, str] | None = None,
        read_only: bool = False,
        ignore_adds: bool = False,
    ) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, but is {width}")
        if not fingerprint or not fingerprint.isalnum():
            raise ValueError(f"a fingerprint is letters and digits, but is {fingerprint!r}")
        self.folder = Path(root) / fingerprint
        self.width = width
        self.description = dict(description or {})
        self.read_only = read_only
        self.ignore_adds = ignore_adds
        self._pending: list[Part] = []
        self.pending = 0
        """Records added since the last flush."""
        self._damaged: set[Path] = set()

    # Reading

    def parts(self) -> Iterator[Part]:
        """The intact parts one after the other, the oldest first, then what is not flushed. Parts of another
        width are left out: pairs and single responses may share a fingerprint, never a record. Truncated or
        corrupt ones are ignored with a warning, so that their values count as missing.

        Raises ReferenceStoreError for a store of a later version.
        """
        self._require_known_version()
        for path in sorted(self.folder.glob(PATTERN)):
            try:
                part = read_part(path)
            except DAMAGED as error:
                if path not in self._damaged:
                    self._damaged.add(path)
                    warnings.warn(
                        f"reference store: {path} is damaged ({error}); its values will be recomputed",
                        stacklevel=2,
                    )
                continue
            if part.values.shape[1] == self.width:
                yield part
        yield from self._pending

    def stored(self, ids: Array) -> npt.NDArray[np.bool_]:
        """(n,) whether each record has a value. Raises ReferenceStoreError for a store of a later version."""
        self._require_known_version()
        if find_table(self.folder, ids, self.width) is not None:
            return np.ones(len(ids), np.bool_)
        first, places = distinct(ids)
        index = IdIndex(ids if places is None else ids[first])
        found = np.zeros(len(first), np.bool_)
        for part in self.parts():
            at = index.find(part.ids)
            found[at[at >= 0]] = True
        return found if places is None else found[places]

    def missing(self, ids: Array) -> Array:
        """Ascending positions in ``ids`` of the records without a value."""
        return np.flatnonzero(~self.stored(ids))

    def values_of(self, ids: Array) -> FloatArray:
        """(n, width) float32 of a few records, each once; NaN where there is no value."""
        index, found = IdIndex(ids), np.full((len(ids), self.width), np.nan, np.float32)
        for part in self.parts():
            at = index.find(part.ids)
            new = np.flatnonzero(at >= 0)[::-1]  # the first of a part is written last
            new = new[np.isnan(found[at[new], 0])]
            found[at[new]] = part.values[new]
        return found

    def table(self, ids: Array) -> FloatArray:
        """(N, width) float32: the value of each record, in the order of ``ids``, mapped from a file that is
        made where there is none.

        Raises ReferenceStoreError with the count and the first record where any has no value, where it cannot
        be written, and for a store of a later version.
        """
        self._require_known_version()
        table = find_table(self.folder, ids, self.width)
        if table is not None:
            return table
        try:
            return write_table(self.folder, ids, self.width, self.parts())
        except AbsentError as error:
            first = int(error.positions[0])
            raise ReferenceStoreError(
                f"{len(error.positions)} of {len(ids)} records have no reference log-probability in "
                f"{self.folder}, first: record {name_of(ids[first])} at position {first}. Run the reference "
                "pass again"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error

    # Writing

    def add(self, ids: Array, values: npt.ArrayLike) -> None:
        """Buffer ``values``, (n, width), for n records. The first value of an id counts.

        Raises ReferenceStoreError naming a record whose values are not finite.
        """
        if self.read_only:
            if self.ignore_adds:
                return
            raise RuntimeError(f"the reference store {self.folder} was opened read-only")
        array = np.array(values, dtype=np.float32)
        if array.shape != (len(ids), self.width):
            raise ValueError(f"values must have shape ({len(ids)}, {self.width}), but have {array.shape}")
        if ids.dtype != np.uint8 or ids.shape != (len(ids), ID_BYTES):
            raise ValueError(f"ids must be (n, {ID_BYTES}) uint8, but are {ids.shape} {ids.dtype}")
        require_finite(ids, array)
        if len(ids):
            self._pending.append(Part(np.array(ids), array))
            self.pending += len(ids)

    def prepare(self) -> None:
        """Create the folder and ``store.json``, to detect an unwritable folder before hours of work.

        Raises ReferenceStoreError.
        """
        if self.read_only:
            return
        self._require_known_version()
        path = self.folder / ABOUT
        if not path.exists():
            about = {"format": FORMAT, "fingerprint_of": self.description}
            self._write(path, json.dumps(about, indent=2, sort_keys=True).encode() + b"\n")

    def flush(self) -> None:
        """Write what was added since the last flush as one new part, atomically.

        Raises ReferenceStoreError where that fails; what was added stays buffered.
        """
        if not self._pending:
            return
        self.prepare()
        ids, values = (np.concatenate(arrays) for arrays in zip(*self._pending, strict=True))
        first, _ = distinct(ids)
        number = 1 + max(map(part_number, self.folder.glob(PATTERN)), default=-1)
        # The random half keeps two runs that share the store from taking the same name.
        name = f"part-{number:05d}-{secrets.token_hex(4)}.safetensors"
        self._write(self.folder / name, part_bytes(Part(ids[first], values[first])))
        self._pending, self.pending = [], 0

    def _write(self, path: Path, data: bytes) -> None:
        try:
            atomic_write(path, data)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ReferenceStoreError:
        return ReferenceStoreError(
            f"cannot write reference log-probabilities to {self.folder}: {explain(error)}. "
            "Earlier values are intact, and the next run resumes from them"
        )

    def _require_known_version(self) -> None:
        about = read_about(self.folder)
        if about is not None and about.get("format") != FORMAT:
            raise ReferenceStoreError(
                f"{self.folder} is {about.get('format')!r}, but this version reads {FORMAT!r}: use the "
                "version that wrote it, or choose another data.cache_dir"
            )


def read_about(folder: Path) -> dict[str, Any] | None:
    """What ``store.json`` says; None where there is none, or it is damaged: it is for humans alone."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and "format" in about else None
