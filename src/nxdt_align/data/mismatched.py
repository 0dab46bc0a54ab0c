"""KTO's mismatched completions: each record gets another one's, from which KTO estimates its KL term.

TRL rotates completions by one inside batches; here it is the whole data set, so that the pairing, and with it
a stored reference value, does not depend on the batch size. Completions of the same prompt and equal ones are
passed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nxdt_align.data.records import DataError, Prompt, Record, Response, canonical
from nxdt_align.record_ids import Array

_ROUNDS = 64
"""Jumps over runs of equal prompts or completions, all records at once, before one goes through them in
order."""


def with_mismatched(records: Sequence[Record]) -> list[Record]:
    """The records, each with the completion of the one before it (the first: the last one's) that has neither
    its prompt nor its completion. Raises DataError if a record has no candidate."""
    found: list[Record] = []
    completions = [_Completion(record.prompt, record.responses[0], i) for i, record in enumerate(records)]
    for record, before in zip(records, _in_order(completions), strict=True):
        if before is None:
            raise DataError(no_candidate(record.source))
        found.append(replace(record, responses=(*record.responses, records[before].responses[0])))
    return found


def no_candidate(place: str) -> str:
    return (
        f"{place}: KTO needs another prompt's completion beside each, but no other prompt of the data has "
        "another completion; its KL term is estimated from such pairs"
    )


# Of records that are not held


class NoCandidateError(ValueError):
    """The record at a position has no candidate."""

    def __init__(self, position: int) -> None:
        super().__init__(f"the record at position {position} has no candidate")
        self.position = position


def digest_of(content: Prompt | Response) -> bytes:
    """16 bytes, the same for equal prompts or completions alone."""
    return hashlib.blake2b(canonical(content).encode(), digest_size=16).digest()


def mismatched(prompts: Array, completions: Array) -> Array:
    """(N,) int64: of records with these prompts and completions, (N,) numbers that are equal where they are,
    the position of the record whose completion each gets from ``with_mismatched``.

    Raises NoCandidateError for the first that has none.
    """
    count = len(prompts)
    # Where to look, -1 being the last record: what is seen from a record goes once around.
    at = np.arange(-1, count - 1)
    open_ = np.arange(count)
    runs = [_run_starts(prompts), _run_starts(completions)]
    for _ in range(_ROUNDS):
        place = at[open_] % count
        is_same = [each[place] == each[open_] for each in (prompts, completions)]
        again = (is_same[0] | is_same[1]) & (at[open_] > open_ - count)
        open_, place = open_[again], place[again]
        if not len(open_):
            break
        # Behind the longer of the two runs that it is in, as far as they are its own.
        steps = [
            np.where(same[again], place - run[place], 0) for same, run in zip(is_same, runs, strict=True)
        ]
        at[open_] -= np.maximum(*steps) + 1
    else:
        _fill(at, open_, prompts, completions)
    lost = np.flatnonzero(at <= np.arange(count) - count)
    if len(lost):
        raise NoCandidateError(int(lost[0]))
    found: Array = at % count
    return found


def _run_starts(values: Array) -> Array:
    """(N,) of each value where the run of equal ones begins that it is in."""
    starts = np.arange(len(values))
    starts[1:][values[1:] == values[:-1]] = 0
    found: Array = np.maximum.accumulate(starts)
    return found


def _fill(at: Array, open_: Array, prompts: Array, completions: Array) -> None:
    """Look for what ``open_`` positions get one record after the other."""
    count = len(at)
    listed = map(_Completion, prompts.tolist(), completions.tolist(), range(count))
    wanted = np.zeros(count, np.bool_)
    wanted[open_] = True
    for position, before in enumerate(_in_order(list(listed))):
        if wanted[position]:
            at[position] = position - count if before is None else before - count * (before > position)


class _Completion(NamedTuple):
    prompt: object
    completion: object
    position: int


def _in_order(completions: Sequence[_Completion]) -> Iterator[int | None]:
    """Of each the position of the one that it gets; None: there is none."""
    latest = _Latest()
    for each in completions:
        latest.add(each)
    for each in completions:
        before = latest.other_than(each.prompt, each.completion)
        yield None if before is None else before.position
        latest.add(each)


class _Latest:
    """The latest of the completions added so far that has neither a given prompt nor a given completion,
    found without a search: five of them answer every such question.

    The last one, unless the question has its prompt or its completion. If it has the prompt: the latest of
    another prompt, or, if that has the completion asked for, the latest of neither; and so with the
    completion.
    """

    def __init__(self) -> None:
        self._kept: list[_Completion] = []
        """The latest first."""

    def other_than(self, prompt: object, completion: object) -> _Completion | None:
        """None: whatever it is."""
        return next((c for c in self._kept if c.prompt != prompt and c.completion != completion), None)

    def add(self, new: _Completion) -> None:
        kept = [self.other_than(new.prompt, None), self.other_than(None, new.completion)]
        kept.append(kept[0] and self.other_than(new.prompt, kept[0].completion))
        kept.append(kept[1] and self.other_than(kept[1].prompt, new.completion))
        self._kept = [new, *(c for c in self._kept if any(c is each for each in kept))]
