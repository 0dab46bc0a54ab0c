"""How long the parts of training steps take: data, forward and backward pass, optimizer, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["data", "forward_backward", "optimizer", "metrics"]
_WORDS: dict[Phase, str] = {
    "data": "waiting for data",
    "forward_backward": "forward and backward",
    "optimizer": "clipping and optimizer",
    "metrics": "metrics and logging",
}


class Phases:
    """Seconds per phase, of the newest step and of all.

    Args:
        settle: waits for the device at a phase's end; without it the times are the host's, who may be ahead
            of the device.
    """

    def __init__(
        self, settle: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._settle, self._clock = settle, clock
        self.newest: dict[Phase, float] = {}
        self._totals: dict[Phase, float] = dict.fromkeys(_WORDS, 0.0)
        self._steps = 0
        self._waiting_since: float | None = None

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        began = self._clock()
        yield
        if self._settle is not None:
            self._settle()
        self._add(phase, self._clock() - began)

    def begin_step(self) -> None:
        """The data are there: the wait since ``wait`` is over."""
        self._steps += 1
        if self._waiting_since is not None:
            self._add("data", self._clock() - self._waiting_since)
        self._waiting_since = None

    def wait(self) -> None:
        """From now on the next step's data are waited for; called again where something else came between."""
        self._waiting_since = self._clock()

    def summary(self) -> str:
        """A line for the log; empty before the first step."""
        whole = sum(self._totals.values())
        if not self._steps or whole <= 0:
            return ""
        parts = (f"{_WORDS[phase]} {seconds / whole:.0%}" for phase, seconds in self._totals.items())
        clock = "the host's times" if self._settle is None else "waiting for the device at each phase's end"
        return f"{self._steps} steps of {whole / self._steps:.3f} s: {', '.join(parts)} ({clock})"

    def _add(self, phase: Phase, seconds: float) -> None:
        self.newest[phase] = seconds
        self._totals[phase] += seconds
