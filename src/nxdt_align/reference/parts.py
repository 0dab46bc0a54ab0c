"""The files of a reference store: parts, each some records and their values, written once."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from nxdt_align.record_ids import ID_BYTES, Array

FloatArray = npt.NDArray[np.float32]

FORMAT = "nxdt-align reference store 1"
PATTERN = "part-*.safetensors"
DAMAGED = (SafetensorError, OSError, ValueError)
"""What reading a damaged part raises."""


class Part(NamedTuple):
    """Records and their values."""

    ids: Array
    """(n, 16) uint8"""
    values: FloatArray
    """(n, width) float32, nats"""


def part_number(path: Path) -> int:
    """Of a part's file name; 0 for one that has none."""
    digits = path.name.split("-")[1].split(".")[0]
    return int(digits) if digits.isdigit() else 0


def digest_of(*arrays: Array) -> str:
    """Of their bytes: 32 hex digits."""
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def part_bytes(part: Part) -> bytes:
    """What a part's file holds."""
    ids, values = np.ascontiguousarray(part.ids), np.ascontiguousarray(part.values)
    metadata = {"format": FORMAT, "digest": digest_of(ids, values)}
    return to_safetensors({"ids": ids, "values": values}, metadata=metadata)


def read_part(path: Path) -> Part:
    """Raises one of ``DAMAGED`` where it is not as it was written."""
    with safe_open(path, framework="numpy") as file:
        if set(file.keys()) != {"ids", "values"}:
            raise ValueError(f"it holds {sorted(file.keys())} instead of ids and values")
        ids, values = file.get_tensor("ids"), file.get_tensor("values")
        expected = (file.metadata() or {}).get("digest")
    if ids.dtype != np.uint8 or ids.shape[1:] != (ID_BYTES,):
        raise ValueError(f"ids are {ids.dtype} {ids.shape}")
    if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(ids):
        raise ValueError(f"values are {values.dtype} {values.shape} for {len(ids)} ids")
    if digest_of(ids, values) != expected:
        raise ValueError("its content does not match its digest")
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return Part(ids, values)
