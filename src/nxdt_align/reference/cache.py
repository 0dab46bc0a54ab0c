"""The reference store: log-probabilities on disk, one entry per record, under a fingerprint of their inputs.

A value belongs to a record's content, not to a position, so order, data-parallel size, restarts and epochs
cannot mix values up. Layout::

    <root>/<fingerprint>/store.json                    what the fingerprint was made from
    <root>/<fingerprint>/part-NNNNN-XXXXXXXX.safetensors   ids (n, 16) uint8, values (n, width) float32

A part is written once, atomically, with a digest of its content. Parts are only added, under unique names, so
that two runs can share a store.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write, explain

FloatArray = npt.NDArray[np.float32]

ID_BYTES = 16
FORMAT = "nxdt-align reference store 1"


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


def require_finite(ids: Sequence[str], values: FloatArray) -> None:
    """Raise ReferenceStoreError, naming the record, where a value is NaN or infinite."""
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        first = int(bad.argmax())
        raise ReferenceStoreError(
            f"the reference log-probabilities of {int(bad.sum())} record(s) are not finite, first record "
            f"{ids[first]}: {values[first].tolist()}. Check the reference's weights and the precision "
            "(fp32 rules out overflow)"
        )


class ReferenceStore:
    """The values of one fingerprint: ``width`` float32 numbers per record, in nats.

    Independent of process groups: one process (rank 0) owns it. ``add`` buffers; ``flush`` writes.

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
        self._loaded: dict[bytes, FloatArray] | None = None
        self._pending: list[bytes] = []
        self._next_part = 0

    @property
    def _values(self) -> dict[bytes, FloatArray]:
        """Read when they are first asked for: of many ranks, one asks."""
        if self._loaded is None:
            self._loaded = {}
            self.load()
        return self._loaded

    def __len__(self) -> int:
        """Records with a value, written or buffered."""
        return len(self._values)

    @property
    def pending(self) -> int:
        """Records added since the last flush."""
        return len(self._pending)

    def load(self) -> None:
        """Read all intact parts. Truncated or corrupt ones are ignored with a warning, so that their values
        count as missing; unflushed values are kept."""
        kept = {key: self._values[key] for key in self._pending}
        self._loaded = {}
        for path in sorted(self.folder.glob("part-*.safetensors")):
            self._next_part = max(self._next_part, _part_number(path) + 1)
            try:
                ids, values = _read_part(path, self.width)
            except (SafetensorError, OSError, ValueError) as error:
                warnings.warn(
                    f"reference store: {path} is damaged ({error}); its values will be recomputed",
                    stacklevel=2,
                )
                continue
            for key, value in zip(ids, values, strict=True):
                self._values.setdefault(key, value)
        for key, value in kept.items():
            self._values.setdefault(key, value)

    def add(self, ids: Sequence[str], values: npt.ArrayLike) -> None:
        """Buffer ``values``, (n, width), for n records. The first value of an id wins.

        Raises ReferenceStoreError naming a record whose values are not finite.
        """
        if self.read_only:
            if self.ignore_adds:
                return
            raise RuntimeError(f"the reference store {self.folder} was opened read-only")
        array = np.asarray(values, dtype=np.float32)
        if array.shape != (len(ids), self.width):
            raise ValueError(f"values must have shape ({len(ids)}, {self.width}), but have {array.shape}")
        require_finite(ids, array)
        for key, value in zip(map(_key, ids), array, strict=True):
            if key not in self._values:
                self._values[key] = value.copy()
                self._pending.append(key)

    def prepare(self) -> None:
        """Create the folder and ``store.json``, to detect an unwritable folder before hours of work.

        Raises ReferenceStoreError.
        """
        if self.read_only:
            return
        about = {"format": FORMAT, "fingerprint_of": self.description}
        path = self.folder / "store.json"
        if not path.exists():
            self._write(path, json.dumps(about, indent=2, sort_keys=True).encode() + b"\n")

    def flush(self) -> None:
        """Write what was added since the last flush as one new part, atomically.

        Raises ReferenceStoreError where that fails; what was added stays buffered.
        """
        if not self._pending:
            return
        self.prepare()
        ids = np.frombuffer(b"".join(self._pending), np.uint8).reshape(-1, ID_BYTES)
        values = np.stack([self._values[key] for key in self._pending])
        metadata = {"format": FORMAT, "digest": _digest(ids, values)}
        # The random half keeps two runs that share the store from taking the same name.
        name = f"part-{self._next_part:05d}-{secrets.token_hex(4)}.safetensors"
        self._write(self.folder / name, to_safetensors({"ids": ids, "values": values}, metadata=metadata))
        self._next_part += 1
        self._pending = []

    def missing(self, ids: Sequence[str]) -> list[int]:
        """Positions in ``ids`` of the records without a value."""
        return [i for i, record in enumerate(ids) if _key(record) not in self._values]

    def table(self, ids: Sequence[str]) -> FloatArray:
        """(N, width) float32: the value of each record, in the order of ``ids``.

        Raises ReferenceStoreError with the count and the first record where any has no value.
        """
        absent = self.missing(ids)
        if absent:
            raise ReferenceStoreError(
                f"{len(absent)} of {len(ids)} records have no reference log-probability in {self.folder}, "
                f"first: record {ids[absent[0]]} at position {absent[0]}. Run the reference pass again"
            )
        table = np.empty((len(ids), self.width), np.float32)
        for i, record in enumerate(ids):
            table[i] = self._values[_key(record)]
        return table

    def _write(self, path: Path, data: bytes) -> None:
        try:
            atomic_write(path, data)
        except OSError as error:
            raise ReferenceStoreError(
                f"cannot write reference log-probabilities to {self.folder}: {explain(error)}. "
                "Earlier values are intact, and the next run resumes from them"
            ) from error


def _key(record: str) -> bytes:
    try:
        key = bytes.fromhex(record)
    except ValueError:
        key = b""
    if len(key) != ID_BYTES:
        raise ValueError(f"a record id is {2 * ID_BYTES} hex digits, but is {record!r}")
    return key


def _part_number(path: Path) -> int:
    digits = path.name.split("-")[1].split(".")[0]
    return int(digits) if digits.isdigit() else 0


def _digest(ids: npt.NDArray[np.uint8], values: FloatArray) -> str:
    digest = blake2b(digest_size=16)
    digest.update(ids.tobytes())
    digest.update(values.tobytes())
    return digest.hexdigest()


def _read_part(path: Path, width: int) -> tuple[list[bytes], FloatArray]:
    """Ids and (n, width) values; empty for a part of another width. Raises SafetensorError, OSError or
    ValueError if the part is damaged."""
    with safe_open(path, framework="numpy") as file:
        if set(file.keys()) != {"ids", "values"}:
            raise ValueError(f"it holds {sorted(file.keys())} instead of ids and values")
        ids, values = file.get_tensor("ids"), file.get_tensor("values")
        expected = (file.metadata() or {}).get("digest")
    if ids.dtype != np.uint8 or ids.shape[1:] != (ID_BYTES,):
        raise ValueError(f"ids are {ids.dtype} {ids.shape}")
    if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(ids):
        raise ValueError(f"values are {values.dtype} {values.shape} for {len(ids)} ids")
    if _digest(ids, values) != expected:
        raise ValueError("its content does not match its digest")
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    if values.shape[1] != width:  # pairs and single responses may share a fingerprint, never a record
        return [], values[:0]
    return [row.tobytes() for row in ids], values
