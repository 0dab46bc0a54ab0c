"""Texts that are nearly the same: MinHash signatures in bands (Broder 1997; Leskovec et al., Mining of
Massive Datasets, chapter 3), candidates checked by their exact Jaccard similarity."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SIMILAR = 0.8
"""Least share of word triples that two near-duplicates have in common."""
_BANDS, _ROWS = 16, 4
"""Of a signature: two texts of similarity 0.8 share a band with probability 0.9998, of 0.3 with 0.12."""
_LARGEST_BUCKET = 50
"""Of one band, beyond which only neighbours are compared, or a template's text would make it quadratic."""
_WORD = re.compile(r"\w+")


def normalized(text: str) -> str:
    """Its words in lower case: texts that are equal but for case, punctuation and white space are one."""
    return " ".join(_WORD.findall(text.lower()))


def similar_pairs(first: Sequence[str], second: Sequence[str] | None = None) -> list[tuple[int, int]]:
    """Indices (i, j) of texts with similarity ``SIMILAR`` or more: i < j within ``first``, or of ``first``
    and ``second``. Texts of fewer than three words are compared as a whole.

    Almost all such pairs, in time that grows with the number of texts and not its square.
    """
    texts = [*first, *(second or ())]
    shingles = [_shingles(text) for text in texts]
    found: set[tuple[int, int]] = set()
    for i, j in _candidates(shingles):
        i, j = min(i, j), max(i, j)
        crosses = second is None or (i < len(first) <= j)
        if crosses and (i, j) not in found and _jaccard(shingles[i], shingles[j]) >= SIMILAR:
            found.add((i, j))
    shift = 0 if second is None else len(first)
    return sorted((i, j - shift) for i, j in found)


def _shingles(text: str) -> frozenset[int]:
    words = normalized(text).split()
    triples = [" ".join(words[at : at + 3]) for at in range(max(len(words) - 2, 1))] if words else []
    # crc32, not hash: the same in every process.
    return frozenset(zlib.crc32(triple.encode()) for triple in triples)


def _candidates(shingles: Sequence[frozenset[int]]) -> Iterator[tuple[int, int]]:
    signatures = _signatures(shingles)
    for band in range(_BANDS):
        buckets: dict[bytes, list[int]] = {}
        part = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS])
        for index, own in enumerate(shingles):
            if own:
                buckets.setdefault(part[index].tobytes(), []).append(index)
        for members in buckets.values():
            for at, one in enumerate(members):
                for other in members[at + 1 : at + 1 + _LARGEST_BUCKET]:
                    yield one, other


def _signatures(shingles: Sequence[frozenset[int]]) -> npt.NDArray[Any]:
    """(N, bands x rows) uint64: of each hash function the least value over a text's shingles."""
    rng = np.random.default_rng(0)
    count = _BANDS * _ROWS
    # Multiply-shift (Dietzfelbinger 1996): odd factors, products modulo 2^64, of which the high bits count.
    factors = rng.integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)
    offsets = rng.integers(0, 2**64, count, dtype=np.uint64)
    table = np.zeros((len(shingles), count), dtype=np.uint64)
    for index, own in enumerate(shingles):
        if own:
            values = np.fromiter(own, dtype=np.uint64, count=len(own))
            table[index] = ((values[:, None] * factors + offsets) >> np.uint64(32)).min(axis=0)
    return table


def _jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    return len(first & second) / len(first | second)
