"""What ``precision`` means on this engine: the dtype that is computed in, and where fp32 is kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """``compute``: dtype of weights and activations. ``autocast``: weights stay float32 and each
    operation's dtype is torch.autocast's choice."""

    compute: torch.dtype = torch.float32
    autocast: bool = False

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Entered around the model's forward pass."""
        if self.autocast:
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype with the fewest bits that values pass through."""
        return torch.bfloat16 if self.autocast else self.compute

    @property
    def has_masters(self) -> bool:
        """Whether the weights that are computed with are copies of float32 master weights."""
        return self.compute != torch.float32

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients may leave the range of the dtype that they are computed in."""
        return self.compute == torch.float16
