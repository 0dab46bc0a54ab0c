"""Ranks that load weights in turns, as host memory holds those of a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nxdt_align.engines.base import EngineError
from nxdt_align.errors import UserError

Gather = Callable[[str | None], Sequence[str | None]]
"""Every rank's value, on every rank."""


@dataclass(frozen=True)
class Turns:
    """How many ranks of a node do something at once (``trainer.sequential_move_factor``)."""

    local_rank: int = 0
    local_ranks: int = 1
    """The same on every node."""
    at_once: int | None = None
    """None: all."""

    def take(self, action: Callable[[], None], gather: Gather) -> None:
        """Do ``action`` when it is this rank's turn. Every rank calls this.

        ``action`` needs no other rank. What fails on one is the same error on all, before the next turn.
        """
        if self.at_once is None or self.at_once >= self.local_ranks:
            action()
            return
        for first in range(0, self.local_ranks, self.at_once):
            fault: UserError | None = None
            if first <= self.local_rank < first + self.at_once:
                fault = _attempt(action)
            told = next(filter(None, gather(None if fault is None else str(fault))), None)
            if told is not None:
                raise fault or EngineError(told)


def _attempt(action: Callable[[], None]) -> UserError | None:
    try:
        action()
    except UserError as error:
        return error
    return None
