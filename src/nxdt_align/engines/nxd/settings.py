"""What a run can set of this engine. Nothing here needs NxD."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nxdt_align.models.partition import QKV


@dataclass(frozen=True)
class Parallel:
    """Sizes and switches of ``distributed_strategy``, and ``model.qkv_linear`` and ``fuse_qkv``."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    """Activations between the parallel layers are split along the sequence."""
    kv_multiplier: int = 1
    qkv: QKV = "split"
    zero1: bool = False


@dataclass(frozen=True)
class Precision:
    """``compute``: dtype of weights and activations; ``masters``: the optimizer works on float32 copies of
    the weights, and micro-batches' gradients are added up in float32."""

    compute: torch.dtype = torch.float32
    masters: bool = False

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype with the fewest bits that values pass through."""
        return self.compute


@dataclass(frozen=True)
class SaveOptions:
    """``exp_manager``'s settings of the files."""

    xser: bool = False
    """A file a tensor (torch_xla's serialization)."""
    low_precision: torch.dtype | None = None
    """What the model's files hold the weights in; None for what the optimizer works on."""
