"""Metrics that are not the loss's: throughput, and means over a validation pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

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
    """Means over the examples (or tokens) of several steps, in float32, on the metrics' device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | None = None

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """``values`` are means over a step that counts ``weight`` examples (or tokens)."""
        for name, value in values.items():
            present = self._sums.get(name)
            self._sums[name] = value * weight if present is None else present + value * weight
        self._weight = weight if self._weight is None else self._weight + weight

    def means(self) -> dict[str, Tensor]:
        """The means so far; empty where nothing was added."""
        if self._weight is None:
            return {}
        return {name: total / torch.clamp(self._weight, min=1.0) for name, total in self._sums.items()}
