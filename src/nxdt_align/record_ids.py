"""Ids of many records as arrays, (N, 16) uint8: a million of them take 16 MB, which a file may hold, and as
text eight times that of each process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ID_BYTES = 16


def as_bytes(record_ids: Sequence[str]) -> Array:
    """(N, 16) uint8: ids of 32 hex digits each. Raises ValueError for others."""
    return np.frombuffer(bytes.fromhex("".join(record_ids)), np.uint8).reshape(-1, ID_BYTES)


def distinct(ids: Array) -> tuple[Array, Array | None]:
    """Ascending indices of the records whose id, (N, 16) uint8, no earlier one has; and of each record the
    place of its id among them, (N,), None where all differ."""
    # By half of the hash, which sorts many times faster than all of it; without places, faster still.
    halves = np.ascontiguousarray(ids).view(np.uint64)
    ascending = np.sort(halves[:, 0])
    if (ascending[1:] != ascending[:-1]).all():
        return np.arange(len(ids)), None
    _, first, inverse = np.unique(halves[:, 0], return_index=True, return_inverse=True)
    if (halves[:, 1] != halves[first[inverse], 1]).any():
        whole = np.ascontiguousarray(ids).view("V16").ravel()
        _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    places = np.empty(len(first), np.int64)
    places[order] = np.arange(len(first))
    return first[order], places[inverse]


class IdIndex:
    """Where ids stand among D distinct ones.

    Args:
        ids: (D, 16) uint8, each once; kept, not copied. 16 bytes more of each are held.
    """

    def __init__(self, ids: Array) -> None:
        self._halves = np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2)
        self._order = np.argsort(self._halves[:, 0], kind="stable")
        self._keys = self._halves[self._order, 0]

    def find(self, ids: Array) -> Array:
        """(n,) int64: the place of each of these ids, (n, 16) uint8; -1 for others."""
        halves = np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2)
        found = np.full(len(halves), -1, np.int64)
        if not len(self._keys):
            return found
        at = np.searchsorted(self._keys, halves[:, 0])
        open_ = np.arange(len(halves))
        # One round, but for ids that share half of their hash.
        while len(open_):
            open_ = open_[at[open_] < len(self._keys)]
            open_ = open_[self._keys[at[open_]] == halves[open_, 0]]
            places = self._order[at[open_]]
            is_it = self._halves[places, 1] == halves[open_, 1]
            found[open_[is_it]] = places[is_it]
            open_ = open_[~is_it]
            at[open_] += 1
        return found


def spans(count: int, size: int = 2**18) -> Iterator[slice]:
    """``range(count)`` in pieces, so that what is computed over all records stays small."""
    return (slice(begin, min(begin + size, count)) for begin in range(0, count, size))
