"""What a run can set of this engine alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from nxdt_align.engines import settings


@dataclass(frozen=True, kw_only=True)
class Parallel(settings.Parallel):
    """How one model is spread over native's mesh."""

    virtual_pipeline: int = 1
    """Shares of the layers that each pipeline rank holds."""
    fsdp: bool = False
    """As ``zero1``, and weights are gathered a layer at a time, in the forward and in the backward pass."""


@dataclass(frozen=True)
class Precision(settings.Precision):
    """``compute``, with float32 master weights below it; or torch.autocast."""

    autocast: bool = False
    """Weights stay float32, and each operation's dtype is torch.autocast's choice."""

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Entered around the model's forward pass."""
        if self.autocast:
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def coarsest(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.compute

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients may leave the range of the dtype that they are computed in."""
        return self.compute == torch.float16
