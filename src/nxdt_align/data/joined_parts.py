"""The parts of a source as one file's arrays, read as that is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nxdt_align.data.token_columns import Stream
from nxdt_align.data.token_parts import Part
from nxdt_align.record_ids import ID_BYTES, Array


def joined(parts: Sequence[Part], keeps: Array) -> dict[str, Array | Stream]:
    """The arrays of TokenColumns, read from the parts as they are written; of records that ``keeps``, (N,),
    marks."""
    kept: list[tuple[Part, Array]] = []
    at = 0
    for part in parts:
        mine = keeps[at : at + part.records]
        at += part.records
        if mine.any():
            kept.append((part, mine[part.array("good")]))
    lengths = np.concatenate([part.array("prompt_lengths")[mine] for part, mine in kept])
    answers = np.concatenate([part.array("response_lengths")[mine] for part, mine in kept])
    flags = {
        name: np.concatenate([part.array(name)[mine] for part, mine in kept])
        for name in ("truncated", "changed", "identical")
    }
    count, k = answers.shape

    def rows(name: str) -> Iterator[Array]:
        return (np.ascontiguousarray(part.array(name)[mine]) for part, mine in kept)

    def tokens(name: str, length_of: str) -> Iterator[Array]:
        for part, mine in kept:
            found = part.array(name)
            if not mine.all():
                own = part.array(length_of)
                found = found[np.repeat(mine, own if own.ndim == 1 else own.sum(1))]
            yield found

    arrays: dict[str, Array | Stream] = {
        "ids": Stream(np.dtype(np.uint8), (count, ID_BYTES), lambda: rows("ids")),
        "prompt_tokens": Stream(
            np.dtype(np.int32),
            (int(lengths.sum(dtype=np.int64)),),
            lambda: tokens("prompt_tokens", "prompt_lengths"),
        ),
        "prompt_offsets": _offsets(lengths),
        "response_tokens": Stream(
            np.dtype(np.int32),
            (int(answers.sum(dtype=np.int64)),),
            lambda: tokens("response_tokens", "response_lengths"),
        ),
        "response_offsets": _offsets(answers.ravel()),
        **flags,
        "prompt_lengths": lengths,
        "response_lengths": answers,
        "last_tokens": Stream(np.dtype(np.int32), (count, k), lambda: rows("last_tokens")),
    }
    if flags["truncated"].any():
        arrays["whole_lengths"] = Stream(np.dtype(np.int32), (count, 1 + k), lambda: rows("whole_lengths"))
    return arrays


def _offsets(lengths: Array) -> Array:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
