"""The native engine on torch_xla's CPU device, in one process: what runs on a NeuronCore as a graph, where
there is none.

Operations are recorded and run as one compiled graph per step (``mark_step``).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.engines import xla
from nxdt_align.engines.base import WeightSource
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.shards import filling


class XlaEngine(NativeEngine):
    """Takes what NativeEngine takes; ``device`` is torch_xla's."""

    lazy = True

    def load_weights(self, source: WeightSource) -> None:
        super().load_weights(source)
        xla.sync()

    def load_reference(self, source: WeightSource | None) -> None:
        super().load_reference(source)
        xla.sync()

    def mark_step(self) -> None:
        # Here and not when they are needed next, so that all steps are one graph.
        self._sync_from_masters()
        xla.sync()

    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        with nullcontext() if optimizer is None else xla.state_as_computed(optimizer):
            extra = super().load(directory, optimizer)
        xla.sync()
        return extra

    @torch.no_grad()
    def _weights_changed(self) -> None:
        """Loaded masters are rounded on the CPU, and the weights that are computed with are data as well."""
        self._policy.weights_changed()
        if self._masters is not None:
            weights: dict[str, Tensor] = dict(self._policy.trainable())
            with filling(weights) as parts:
                for name, master in self._masters.named_parameters():
                    parts[name].local.copy_(master)
        self._stale = False
