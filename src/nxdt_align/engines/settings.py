"""What a run sets of either engine: how one model is spread, and in which number formats it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How one model is spread; what is left of the processes is data parallel. Each engine adds its own."""

    tensor: int = 1
    """Ranks that share each layer's matrices."""
    pipeline: int = 1
    """Groups in a row that hold a share of the layers each."""
    pipeline_cuts: tuple[int, ...] | None = None
    """Layers after which the model is cut into stages; None for even shares."""
    sequence_parallel: bool = False
    """Keep 1/tensor of a row's tokens per rank between the layers' matrices."""
    zero1: bool = False
    """Divide master weights, reduced gradients and optimizer state over the data-parallel ranks; weights
    are gathered once per step."""

    @property
    def row_multiple(self) -> int:
        """What a row's length must be a multiple of, since ``tensor`` ranks take equal parts of it."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True)
class Precision:
    """Number formats; each engine adds its own.

    The text (``repr``) is part of a reference store's fingerprint, as it tells apart what gives other
    log-probabilities. So what only gradients pass through is left out of it.
    """

    compute: torch.dtype = torch.float32
    """Of the weights that are computed with, and of activations."""

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype with the fewest bits that values pass through."""
        return self.compute

    @property
    def has_masters(self) -> bool:
        """Whether the weights that are computed with are copies of float32 master weights."""
        return self.compute != torch.float32
