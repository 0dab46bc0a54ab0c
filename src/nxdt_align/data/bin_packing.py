"""Packs examples into as few rows as possible, then levels the rows' fill.

Legend: ``n`` examples, each with its numbers of tokens and of response tokens; a row is a tuple of their
    indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[Any]


class Room(NamedTuple):
    """A row's capacity."""

    tokens: int
    responses: int
    """Response tokens."""
    examples: int = 2**30


class _Rows:
    """Rows being filled. Plain lists, not arrays: this is the planner's inner loop, on few rows."""

    def __init__(self, room: Room, count: int = 0) -> None:
        self._room = room
        self.examples: list[list[int]] = [[] for _ in range(count)]
        self.free_tokens = [room.tokens] * count
        self._free_responses = [room.responses] * count

    def holding(self, tokens: int, responses: int) -> list[int]:
        """The rows with room for such an example."""
        most, examples, free_responses = self._room.examples, self.examples, self._free_responses
        return [
            r
            for r, free in enumerate(self.free_tokens)
            if free >= tokens and free_responses[r] >= responses and len(examples[r]) < most
        ]

    def add_row(self) -> int:
        self.examples.append([])
        self.free_tokens.append(self._room.tokens)
        self._free_responses.append(self._room.responses)
        return len(self.examples) - 1

    def put(self, example: int, row: int, tokens: int, responses: int) -> None:
        self.examples[row].append(example)
        self.free_tokens[row] -= tokens
        self._free_responses[row] -= responses


def best_fit(tokens: Counts, responses: Counts, room: Room) -> list[tuple[int, ...]]:
    """Best-fit decreasing: each example, longest first, into the fullest row that still holds it."""
    # In one dimension, best-fit decreasing uses at most 11/9 OPT + 4 bins (Johnson et al. 1974).
    rows = _Rows(room)
    for i, need in _longest_first(tokens, responses):
        holding = rows.holding(*need)
        row = min(holding, key=rows.free_tokens.__getitem__) if holding else rows.add_row()
        rows.put(i, row, *need)
    return [tuple(row) for row in rows.examples]


def level(tokens: Counts, responses: Counts, room: Room, count: int) -> list[tuple[int, ...]]:
    """``count`` rows of about equal fill: each example, longest first, into the emptiest row with
    room for it. Empty if some example finds no room."""
    rows = _Rows(room, count)
    for i, need in _longest_first(tokens, responses):
        holding = rows.holding(*need)
        if not holding:
            return []
        rows.put(i, max(holding, key=rows.free_tokens.__getitem__), *need)
    return [tuple(row) for row in rows.examples]


def _longest_first(tokens: Counts, responses: Counts) -> Iterator[tuple[int, tuple[int, int]]]:
    order = np.argsort(-tokens, kind="stable")
    needs = zip(tokens[order].tolist(), responses[order].tolist(), strict=True)
    return zip(order.tolist(), needs, strict=True)
