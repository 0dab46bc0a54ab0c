"""A decoder as one rank holds it: whole or some stages of a pipeline, spread over the mesh, and the runner
that sends micro-batches through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.compiled import Compiling, is_too_old
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.parallelize import (
    check_sizes,
    drop_gathered,
    shard_over_data_ranks,
    split_over_tensor_ranks,
)
from nxdt_align.engines.native.pipeline import HiddenStates, PipelineRunner, StageScorer, require_torch
from nxdt_align.engines.native.scoring import NativeScorer, ReduceOnceRunner
from nxdt_align.engines.native.settings import Parallel, Precision
from nxdt_align.engines.native.stages import Stage, prune, stages_of_rank
from nxdt_align.engines.scoring import Scorer, WholeRunner
from nxdt_align.engines.steps import Runner
from nxdt_align.models.adapters import AdapterSpec, Switch, add_adapters, use_trained
from nxdt_align.models.decoder import CausalModel, Decoder
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.models.quantized import quantize_base
from nxdt_align.ops.attention import Attention

S = TypeVar("S", Scorer, StageScorer)


class RankModel:
    """This rank's part of a model.

    Args:
        scorers: one with all layers, or one per stage of the pipeline, in order.
        runner: goes through them.
        switch: of its adapters, where it has some.
    """

    def __init__(
        self, scorers: Sequence[Scorer | StageScorer], runner: Runner, switch: Switch | None = None
    ) -> None:
        self._scorers = scorers
        self.runner = runner
        self.switch = switch
        # Not the modules' own list: while FSDP has weights gathered, that holds them, not the shards.
        self._parameters = [pair for scorer in scorers for pair in scorer.decoder.named_parameters()]

    @property
    def whole(self) -> Scorer:
        """The one with all layers."""
        (scorer,) = self._scorers
        assert isinstance(scorer, Scorer), "a pipeline's ranks have a part each"
        return scorer

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the plain model's names."""
        return iter(self._parameters)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self._parameters if parameter.requires_grad]

    def frozen(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self._parameters if not parameter.requires_grad]

    def weights_changed(self) -> None:
        """Forget weights that FSDP has gathered."""
        for scorer in self._scorers:
            drop_gathered(scorer)


def check_parallel(config: ModelShape, parallel: Parallel, *, is_quantized: bool = False) -> None:
    """Raises EngineError for sizes that the model cannot be divided by, and for a pipeline that this torch
    gets wrong.

    Args:
        is_quantized: whether the model's frozen weights are held in 4 bits.
    """
    if is_quantized and (parallel.tensor > 1 or parallel.pipeline > 1):
        raise EngineError(
            "distributed_strategy: tensor_model_parallel_size and pipeline_model_parallel_size must be 1 "
            f"with a quantised base, but are {parallel.tensor} and {parallel.pipeline}; "
            "distributed_strategy.fsdp=full spreads it over all ranks"
        )
    if is_quantized and parallel.fsdp and is_too_old():
        # Torch 2.9's FSDP casts bytes to the compute dtype as it gathers them.
        raise EngineError(
            f"distributed_strategy.fsdp: must be False with a quantised base and torch {torch.__version__}; "
            "install torch 2.13, or set distributed_strategy.zero1=True instead"
        )
    if not isinstance(config, DecoderConfig):
        _refuse_division(config, parallel)
        return
    check_sizes(config, parallel.tensor)
    if parallel.pipeline > 1:
        require_torch()
        _stages(config, parallel, rank=0)


def _refuse_division(config: ModelShape, parallel: Parallel) -> None:
    """transformers' modules are divided over data-parallel ranks alone."""
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    for name, size in sizes.items():
        if size > 1:
            raise EngineError(
                f"distributed_strategy.{name}_model_parallel_size: must be 1 for a {config.model_type} that "
                f"transformers computes, but is {size}; set it to 1 and distributed_strategy.fsdp: True, "
                "which divides weights, gradients and optimizer state over all ranks"
            )


def _stages(config: DecoderConfig, parallel: Parallel, rank: int) -> list[Stage]:
    return stages_of_rank(
        config, rank, parallel.pipeline, chunks=parallel.virtual_pipeline, cuts=parallel.pipeline_cuts
    )


@dataclass(frozen=True)
class Blueprint:
    """How a model is built on this rank."""

    config: ModelShape
    attention: Attention
    precision: Precision
    groups: Groups
    device: torch.device
    configure: Callable[[CausalModel], None]
    """Called with each decoder that is built."""
    adapters: AdapterSpec | None = None
    """Of the policy."""
    compiling: Compiling | None = None
    """None computes op by op."""

    def build(self, *, frozen: bool = False) -> RankModel:
        """A model without values: they are loaded, so initialising them would be wasted."""
        pipeline, parallel = self.groups.pipeline, self.groups.parallel
        switch = None if frozen or self.adapters is None else Switch()
        if pipeline.size == 1:
            scorer = self._finish(self._scorer(None, frozen, switch), frozen)
            reduces_once = self._is_sharded(frozen) and not parallel.fsdp
            runner = (ReduceOnceRunner if reduces_once else WholeRunner)(scorer)
            return RankModel([scorer], runner, switch)
        assert isinstance(self.config, DecoderConfig), "check_parallel refuses other models in a pipeline"
        held = _stages(self.config, parallel, pipeline.rank)
        hidden = HiddenStates(
            self.config.hidden_size,
            self.precision.compute,
            shards=self.groups.parallel.row_multiple,
            ragged=not self.attention.static_shapes,
        )
        stages = [self._finish(StageScorer(self._scorer(s, frozen, switch), s, hidden), frozen) for s in held]
        return RankModel(stages, PipelineRunner(stages, pipeline, self.device), switch)

    def _scorer(self, stage: Stage | None, frozen: bool, switch: Switch | None) -> Scorer:
        """On the meta device, split over the tensor-parallel ranks."""
        decoder = self._decoder()
        self.configure(decoder)
        if stage is not None:
            assert isinstance(decoder, Decoder)
            prune(decoder, stage)
        decoder.requires_grad_(not frozen)
        if switch is not None and self.adapters is not None:
            add_adapters(decoder.tree, self.adapters, switch)
        # Weights that FSDP shards are float32 and computed with in the compute dtype, unless they are frozen.
        if frozen or not self._is_sharded(frozen):
            decoder.to(dtype=self.precision.compute)
        elif switch is not None:
            kept = self.config.float32_weights
            for name, parameter in decoder.named_parameters():
                if not parameter.requires_grad and name not in kept:
                    parameter.data = parameter.data.to(self.precision.compute)
        if switch is not None and self.adapters is not None and self.adapters.quantize is not None:
            assert isinstance(decoder, Decoder), "spec_of refuses others"
            quantize_base(decoder, decoder.config, self.adapters)
        if isinstance(decoder, Decoder):
            split_over_tensor_ranks(decoder, self.groups)
        if switch is not None and self.adapters is not None:
            use_trained(decoder.tree, self.adapters, switch)
        is_compiled = self.compiling is not None
        scorer = NativeScorer(
            decoder, self.attention, self.precision, self.device, self.groups, keeps_shapes=is_compiled
        )
        if self.compiling is not None:
            self.compiling.model(scorer)
        return scorer

    def _finish(self, scorer: S, frozen: bool) -> S:
        if self._is_sharded(frozen):
            shard_over_data_ranks(scorer, scorer.decoder, self.groups, self.precision)
        with nullcontext() if self.compiling is None else self.compiling.storage():
            scorer.to_empty(device=self.device)
            scorer.decoder.fill_buffers()
        return scorer

    def _decoder(self) -> CausalModel:
        if isinstance(self.config, DecoderConfig):
            with torch.device("meta"):
                return Decoder(self.config, self.attention)
        # Here, as it imports transformers.
        from nxdt_align.models.backend.config import TransformersConfig
        from nxdt_align.models.backend.model import TransformersModel

        assert isinstance(self.config, TransformersConfig)
        return TransformersModel(self.config, self.attention)

    def _is_sharded(self, frozen: bool) -> bool:
        return self.groups.shards_data and (not frozen or self.groups.parallel.fsdp)
