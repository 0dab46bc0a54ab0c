"""What a run can set of this engine. Nothing here needs NxD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from nxdt_align.engines import settings
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.ranks import Ranks
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.partition import QKV, Partition
from nxdt_align.models.presets import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Parallel(settings.Parallel):
    """How one model is spread over NxD's groups; also ``model.qkv_linear`` and ``fuse_qkv``."""

    kv_multiplier: int = 1
    """Ranks that hold the same kv heads."""
    qkv: QKV = "split"

    def partition(self, config: DecoderConfig, adapters: AdapterSpec | None = None) -> Partition:
        """A model spread so. Raises PartitionError for sizes that do not go together."""
        return Partition(
            config,
            self.tensor,
            self.pipeline,
            self.kv_multiplier,
            self.qkv,
            cuts=self.pipeline_cuts,
            adapters=adapters,
        )


@dataclass(frozen=True)
class Precision(settings.Precision):
    """``compute``, with or without float32 master weights. Without them gradients are in ``compute``."""

    masters: bool = False
    """The optimizer works on float32 copies of the weights."""
    float32_sums: bool = field(default=True, repr=False)
    """With ``masters``: micro-batches' gradients are added up in float32, and reduced over ranks so."""
    float32_reductions: bool = field(default=True, repr=False)
    """With ``masters``: gradients are reduced over ranks in float32, whatever they were added up in."""

    @property
    def has_masters(self) -> bool:
        return self.masters


@dataclass(frozen=True)
class SaveOptions:
    """``exp_manager``'s settings of the files."""

    xser: bool = False
    """A file per tensor (torch_xla's serialization)."""
    low_precision: torch.dtype | None = None
    """What the model's files hold the weights in; None for what the optimizer works on."""


# What else needs no NxD: a check of its groups, and loading in turns


def check_kv_groups(
    kv_groups: Sequence[Sequence[int]], tensor_groups: Sequence[Sequence[int]], multiplier: int
) -> None:
    """Raise EngineError unless ranks that share kv heads are of one tensor-parallel group, tp / multiplier
    apart: NxD makes the two kinds of groups by rules of their own, and sums gradients over either."""
    wanted = {
        tuple(group[first :: len(group) // multiplier])
        for group in tensor_groups
        for first in range(len(group) // multiplier)
    }
    if {tuple(group) for group in kv_groups} != wanted:
        raise EngineError(
            f"neuronx-distributed puts the ranks {list(map(list, kv_groups))} together for shared kv heads, "
            f"but its tensor-parallel groups are {list(map(list, tensor_groups))}: gradients of other heads "
            "would be summed. Choose another distributed_strategy.tensor_model_parallel_size, or "
            "kv_replicator=1"
        )


def check_adapters(partition: Partition) -> None:
    """Raise EngineError for adapters that this engine does not train, of a model that is spread so: linear
    layers that are trained whole, and a pipeline stage without a weight to train."""
    spec, peft = partition.adapters, "model_alignment_strategy.peft"
    if spec is None:
        return
    linear = [path for path in spec.saved if path.startswith("model.layers.") and not path.endswith("norm")]
    if linear:
        raise EngineError(
            f"{peft}.modules_to_save: engine nxd trains embed_tokens, lm_head and norms whole, but "
            f"{linear[0]} is a part of one of neuronx-distributed's layers; name it in "
            f"{peft}.target_modules, or set distributed_strategy.engine=native, which trains it whole"
        )
    stages = {stage for n in partition.adapter_shapes if spec.trains(n) for stage in partition.stage_of(n)}
    without = [stage for stage in range(partition.pp) if stage not in stages]
    if without:
        raise EngineError(
            f"{peft}.target_modules: must leave each pipeline stage a weight to train, but stage "
            f"{without[0]} has none; name layers of all stages, or set "
            "distributed_strategy.pipeline_model_parallel_size=1"
        )


@dataclass(frozen=True)
class StaggeredLoad:
    """How many ranks of a node load weights at once (``trainer.sequential_move_factor``): its memory holds
    those of a few."""

    local_rank: int = 0
    local_ranks: int = 1
    """The same on every node."""
    at_once: int | None = None
    """None: all."""

    def take(self, action: Callable[[], None], ranks: Ranks) -> None:
        """Do ``action`` when it is this rank's turn. Every rank calls this.

        ``action`` needs no other rank. What fails on one fails on all, before the next turn.
        """
        if self.at_once is None or self.at_once >= self.local_ranks:
            action()
            return
        for first in range(0, self.local_ranks, self.at_once):
            with ranks.together():
                if first <= self.local_rank < first + self.at_once:
                    action()
