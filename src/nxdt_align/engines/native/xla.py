"""The native engine on torch_xla's CPU device, in one process: what runs on a NeuronCore as a graph, where
there is none.

Operations are recorded and run as one compiled graph a step (``mark_step``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.engines.base import WeightSource
from nxdt_align.engines.native.engine import NativeEngine

Shapes = tuple[tuple[int, ...], ...]
"""Rows, tokens, response tokens and responses a row: of each micro-batch."""


def is_available() -> bool:
    return importlib.util.find_spec("torch_xla") is not None


@cache
def _torch_xla() -> Any:
    import torch_xla

    return torch_xla


def device() -> torch.device:
    """torch_xla's device of this process."""
    found: torch.device = _torch_xla().device()
    return found


def compilations() -> int:
    """Graphs compiled so far in this process."""
    from torch_xla.debug import metrics

    return int(metrics.counter_value("UncachedCompile") or 0)


def recompute(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A Recompute: torch's own knows no XLA, and without this one's barrier the compiler would merge what
    is recomputed with what was computed before."""
    from torch_xla.utils.checkpoint import checkpoint

    result: Tensor = checkpoint(function, *args, preserve_rng_state=False)
    return result


class XlaEngine(NativeEngine):
    """Takes what NativeEngine takes; ``device`` is ``xla.device()``."""

    lazy = True

    def load_weights(self, source: WeightSource) -> None:
        super().load_weights(source)
        self._run()

    def load_reference(self, source: WeightSource | None) -> None:
        super().load_reference(source)
        self._run()

    def mark_step(self) -> None:
        # Here and not when they are needed next, so that all steps are one graph.
        self._publish()
        self._run()

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """Without a graph of its own, where ``mark_step`` came before."""
        found = _torch_xla()._XLAC._xla_get_cpu_tensors([value.detach() for value in values])
        return [float(value) for value in found]

    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        extra = super().load(directory, optimizer)
        self._run()
        return extra

    def _run(self) -> None:
        _torch_xla().sync()
