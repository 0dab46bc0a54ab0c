"""Metrics that are not the loss's: throughput, and means over a validation pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

THROUGHPUT_WINDOW = 10
"""Steps that NxDT averages its throughput over."""


class Throughput:
    """Examples a second over the last steps, and the highest value seen."""

    def __init__(
        self, window: int = THROUGHPUT_WINDOW, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._last = clock()
        self.peak = 0.0

    def restart(self) -> None:
        """Leave out what happened since the last step: a validation pass, a checkpoint."""
        self._last = self._clock()

    def step(self, examples: int) -> float:
        """Count a step of ``examples``; returns the examples a second over the window."""
        now = self._clock()
        self._steps.append((now - self._last, examples))
        self._last = now
        seconds = sum(s for s, _ in self._steps)
        value = sum(n for _, n in self._steps) / max(seconds, 1e-9)
        self.peak = max(self.peak, value)
        return value


class WeightedMeans:
    """Means over the examples (or tokens) of several steps. Values stay on their device until they are
    asked for, so that no step waits for them."""

    def __init__(self) -> None:
        self._steps: list[tuple[dict[str, Tensor], Tensor]] = []

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """``values`` are means over a step that counts ``weight`` examples (or tokens)."""
        self._steps.append((values, weight))

    def means(self, fetch: Callable[[Sequence[Tensor]], list[float]]) -> dict[str, Tensor]:
        """The means so far, () float32 on the host; empty where nothing was added.

        ``fetch`` brings scalars from their device.
        """
        if not self._steps:
            return {}
        names = list(self._steps[0][0])
        numbers = fetch([t for values, weight in self._steps for t in (*(values[n] for n in names), weight)])
        table = torch.tensor(numbers).view(len(self._steps), len(names) + 1)
        weights = table[:, -1:]
        means = (table[:, :-1] * weights).sum(0) / weights.sum().clamp(min=1.0)
        return dict(zip(names, means, strict=True))
