"""ZeRO-1: torch_xla's, which NxD's is."""

from __future__ import annotations

from torch_xla.distributed.zero_redundancy_optimizer import ZeroRedundancyOptimizer


class NeuronZero1Optimizer(ZeroRedundancyOptimizer):  # type: ignore[misc]
    """NxD adds gradient norms and files of its own, neither of which the engine uses."""
