"""Ranks that take turns: who is at it together, and what a failure of one is to the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import Any

import pytest

from nxdt_align.engines.nxd.settings import StaggeredLoad
from nxdt_align.engines.ranks import Ranks
from nxdt_align.errors import UserError

DEADLINE = 60
"""Seconds."""


class Threads(Ranks):
    """Threads as ranks, and what they did between two meetings."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._barrier, self._lock = Barrier(count), Lock()
        self._values: list[Any] = []
        self.acted: list[list[int]] = [[]]

    def gather(self, value: Any) -> list[Any]:
        with self._lock:
            self._values.append(value)
        is_first = self._barrier.wait(DEADLINE) == 0
        found = list(self._values)
        self._barrier.wait(DEADLINE)
        if is_first:
            self._values.clear()
            self.acted.append([])
        self._barrier.wait(DEADLINE)
        return found

    def act(self, rank: int) -> None:
        with self._lock:
            self.acted[-1].append(rank)


def run(count: int, at_once: int | None, failing: int | None = None) -> tuple[Threads, list[str]]:
    ranks = Threads(count)

    def action(rank: int) -> None:
        ranks.act(rank)
        if rank == failing:
            raise UserError(f"rank {rank}'s file is damaged")

    def rank(number: int) -> str:
        try:
            StaggeredLoad(number, count, at_once).take(lambda: action(number), ranks)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(count) as pool:
        return ranks, list(pool.map(rank, range(count)))


@pytest.mark.parametrize(
    ("at_once", "rounds"),
    [
        (2, [{0, 1}, {2, 3}, {4}]),
        (1, [{0}, {1}, {2}, {3}, {4}]),
        (4, [{0, 1, 2, 3}, {4}]),
        (5, [{0, 1, 2, 3, 4}]),
        (None, [{0, 1, 2, 3, 4}]),
    ],
)
def test_so_many_ranks_at_a_time(at_once: int | None, rounds: list[set[int]]) -> None:
    ranks, errors = run(5, at_once)
    assert [set(acted) for acted in ranks.acted if acted] == rounds
    assert sum(map(len, ranks.acted)) == 5 and errors == [""] * 5


def test_a_failure_of_one_is_the_same_error_on_all_and_ends_the_turns() -> None:
    ranks, errors = run(5, 2, failing=2)
    assert errors == ["rank 2's file is damaged"] * 5
    assert [set(acted) for acted in ranks.acted if acted] == [{0, 1}, {2, 3}]
