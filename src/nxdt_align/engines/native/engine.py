"""The native engine: the plain model on PyTorch's own devices and parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nxdt_align.batch import Batch, Topology
from nxdt_align.engines import steps
from nxdt_align.engines.adapters import DROPOUT, AdapterRunner, Dropout
from nxdt_align.engines.base import EngineError, Objective, StepOutput, WeightSource
from nxdt_align.engines.checkpoint_folder import CheckpointError
from nxdt_align.engines.greedy import RowsOf
from nxdt_align.engines.masters import MasterWeights
from nxdt_align.engines.native import checkpoint
from nxdt_align.engines.native.cached import cached_rows
from nxdt_align.engines.native.compiled import Compiling
from nxdt_align.engines.native.gradients import LossScale, clip_gradients, finish_gradients, total_norm
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.model import Blueprint, RankModel, check_parallel
from nxdt_align.engines.native.quantized_source import QuantizedWeights
from nxdt_align.engines.native.saving import Saver
from nxdt_align.engines.native.settings import Parallel, Precision
from nxdt_align.engines.native.shards import copy_weights, fill, whole_tensors
from nxdt_align.engines.ranks import Ranks
from nxdt_align.engines.spread import SpreadEngine
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.decoder import CausalModel
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.ops.attention import FUSED_DEVICES, Attention

LOSS_SCALE = "loss_scale"
"""Key of a checkpoint's values."""


class NativeEngine(SpreadEngine):
    """One model over the mesh of processes.

    Args:
        config: the model's shape.
        attention: how packed rows are attended over.
        precision: compute dtype; float32 master weights are kept below it.
        reference_precision: that of the frozen reference; the policy's where None.
        topology: this process's place among the others.
        parallel: how the model is spread over them.
        device: where this process's part of it lives.
        configure_model: called with each decoder that is built, e.g. to set activation checkpointing.
        timeout: how long a process waits for others; torch's default where None.
        adapters: what is trained instead of the model's weights, which then stay as they are loaded.
        seed: of the adapters' dropout.
        compiling: how parts of a step are compiled; None computes op by op. Wants an attention of static
            shapes.
        groups: this process among the others, where it has joined them already.

    Raises EngineError for sizes of the model that the ranks cannot share, and for a pipeline stage without a
    weight to train.
    """

    def __init__(
        self,
        config: ModelShape,
        attention: Attention,
        *,
        precision: Precision = Precision(),  # noqa: B008 (frozen)
        reference_precision: Precision | None = None,
        topology: Topology = Topology(),  # noqa: B008 (frozen)
        parallel: Parallel = Parallel(),  # noqa: B008 (frozen)
        device: torch.device | str = "cpu",
        configure_model: Callable[[CausalModel], None] = lambda model: None,
        timeout: timedelta | None = None,
        adapters: AdapterSpec | None = None,
        seed: int = 0,
        compiling: Compiling | None = None,
        groups: Groups | None = None,
    ) -> None:
        assert compiling is None or attention.static_shapes
        check_parallel(config, parallel, is_quantized=adapters is not None and adapters.quantize is not None)
        self.topology = topology
        self.device = torch.device(device)
        self.config = config
        self._groups = groups or Groups.join(
            parallel, topology, self.device.type, tied_head=config.tie_word_embeddings, timeout=timeout
        )
        self._compiling = compiling
        self._blueprint = Blueprint(
            *(config, attention, precision, self._groups, self.device, configure_model),
            adapters=adapters,
            compiling=compiling,
        )
        self._reference_precision = reference_precision or precision
        self._policy = self._blueprint.build()
        self._runner = self._policy.runner
        self._frozen: RankModel | None = None
        """What the reference's runner goes through: the policy's model where adapters are switched off."""
        self._dropout: Dropout | None = None
        self._data, self._ranks = self._groups.data, Ranks()
        if adapters is not None:
            self._adapt(adapters, seed)
        has_copies = precision.has_masters and not self._groups.shards_data
        self._masters = MasterWeights(self._policy.trainable()) if has_copies else None
        needs_scale = precision.needs_loss_scale
        self._loss_scale = LossScale(self.device, self._groups.world) if needs_scale else None
        self._saver = Saver(timeout)

    def _adapt(self, adapters: AdapterSpec, seed: int) -> None:
        assert self._policy.switch is not None
        trains = self._ranks.gather(bool(self._policy.trainable()))
        if not all(trains):
            raise EngineError(
                "model_alignment_strategy.peft.target_modules: must leave each pipeline stage a weight to "
                f"train, but rank {trains.index(False)} has none; name layers of all stages, or set "
                "distributed_strategy.pipeline_model_parallel_size=1"
            )
        self.keeps_start = True
        self._dropout = Dropout(adapters, seed, self.topology, self.device)
        self._runner = AdapterRunner(self._runner, self._policy.switch, on=True)

    # Weights

    def load_weights(self, source: WeightSource) -> None:
        spec = self._blueprint.adapters
        if spec is not None and spec.quantize is not None:
            assert isinstance(self.config, DecoderConfig), "spec_of refuses others"
            compute = self._blueprint.precision.compute
            source = QuantizedWeights(source, self.config, spec, compute, self.device)
        fill(self._all_parameters(), source)
        self._weights_changed()

    def load_reference(self, source: WeightSource | None) -> None:
        if source is None and self._policy.switch is not None:
            self._reference = AdapterRunner(self._policy.runner, self._policy.switch, on=False)
            self._frozen = self._policy
            return
        reference = replace(self._blueprint, precision=self._reference_precision).build(frozen=True)
        if source is None:
            held, target = dict(self._all_parameters()), list(reference.named_parameters())
            copy_weights([(name, held[name]) for name, _ in target], target)
        else:
            fill(reference.named_parameters(), source)
        self._reference, self._frozen = reference.runner, reference

    def drop_reference(self) -> None:
        super().drop_reference()
        self._frozen = None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self._policy.trainable() if self._masters is None else list(self._masters.named_parameters())

    def _all_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """With the frozen ones, in the order of the model's own where there are none."""
        return [*self._policy.frozen(), *self.named_parameters()]

    def _saved_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Adapters alone; of a whole model what is not trained too, as a router's balancing bias."""
        return self._all_parameters() if self._policy.switch is None else self.named_parameters()

    def _weights_changed(self) -> None:
        self._policy.weights_changed()
        self._stale = True
        self._sync_from_masters()

    def whole_parameters(self, *, trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        held = self.named_parameters() if trainable else self._all_parameters()
        return whole_tensors(held, self._saver.ranks())

    # Forward and backward

    def step(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        self._computes("training step", micro_batches)
        for _, parameter in self.named_parameters():
            parameter.grad = None
        self._sync_from_masters()
        batches = steps.with_reference(self._reference, micro_batches, objective)
        objective = self._compiled(objective)
        scale = self._loss_scale
        runner = self._runner if scale is None else scale.over(self._runner)
        with nullcontext() if self._dropout is None else self._dropout.seeded():
            output = steps.forward_and_backward(runner, self._data, batches, objective)
        finish_gradients(self.named_parameters(), self._groups)
        if scale is not None:
            scale.unscale([parameter for _, parameter in self.named_parameters()])
        self._stale = True  # the optimizer's step comes next
        return output

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        return super().evaluate(micro_batches, self._compiled(objective))

    def _rows_of_texts(self, length: int, *, reference: bool = False) -> AbstractContextManager[RowsOf]:
        """With a key-value cache, whose shapes grow, where one process computes op by op."""
        is_alone = self.topology.world_size == 1 and self.device.type in FUSED_DEVICES
        model = self._frozen if reference else self._policy
        if model is not None and is_alone and self._compiling is None and model.whole.decoder.takes_cache:
            return cached_rows(model.whole, length)
        return super()._rows_of_texts(length, reference=reference)

    def _compiled(self, objective: Objective) -> Objective:
        return objective if self._compiling is None else self._compiling.objective(objective)

    @property
    def skips_step(self) -> bool:
        return self._loss_scale is not None and self._loss_scale.skips_step

    def status(self) -> dict[str, float]:
        if self._loss_scale is None:
            return {}
        return {"loss_scale": self._loss_scale.value, "skipped_steps": float(self._loss_scale.skipped_steps)}

    # Norms

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        return clip_gradients(self.named_parameters(), max_norm, self._groups)

    def parameter_norm(self) -> Tensor:
        return total_norm(self.named_parameters(), self._groups)

    # Checkpoints

    def save(
        self,
        directory: Path,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> None:
        if self._loss_scale is not None:
            extra = {**extra, LOSS_SCALE: self._loss_scale.state()}
        if self._dropout is not None:
            extra = {**extra, DROPOUT: self._dropout.steps}
        self._saver.save(directory, self._saved_parameters(), optimizer, extra, background=background)

    def finish_saving(self) -> None:
        self._saver.finish()

    def once_saved(self, action: Callable[[], None]) -> None:
        self._saver.then(action)

    def read_extra(self, directory: Path) -> dict[str, Any]:
        self._saver.finish()
        with self._ranks.together(CheckpointError):
            return checkpoint.read_extra(directory)

    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        self._saver.finish()
        extra = checkpoint.load(directory, self._saved_parameters(), optimizer)
        self._weights_changed()
        if self._loss_scale is not None and LOSS_SCALE in extra:
            self._loss_scale.load_state(extra[LOSS_SCALE])
        if self._dropout is not None:
            self._dropout.steps = int(extra.get(DROPOUT, 0))
        return extra
