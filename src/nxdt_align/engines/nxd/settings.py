"""What a run can set of this engine. Nothing here needs NxD."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nxdt_align.models.partition import QKV, Partition
from nxdt_align.models.presets import LlamaConfig


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
    pipeline_cuts: tuple[int, ...] | None = None
    """Layers after which the model is cut into stages; None for even shares."""

    def partition(self, config: LlamaConfig) -> Partition:
        """A model spread so. Raises PartitionError for sizes that do not go together."""
        return Partition(
            config, self.tensor, self.pipeline, self.kv_multiplier, self.qkv, cuts=self.pipeline_cuts
        )


@dataclass(frozen=True)
class Precision:
    """Number formats. What only gradients pass through is no part of its text, which tells apart what gives
    other log-probabilities."""

    compute: torch.dtype = torch.float32
    """Of weights and activations."""
    masters: bool = False
    """The optimizer works on float32 copies of the weights. Without them gradients are in ``compute``."""
    float32_sums: bool = field(default=True, repr=False)
    """With ``masters``: micro-batches' gradients are added up in float32, and reduced over ranks so."""
    float32_reductions: bool = field(default=True, repr=False)
    """With ``masters``: gradients are reduced over ranks in float32, whatever they were added up in."""

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
