"""The NxD engine: the plain model in neuronx-distributed's layers, on NeuronCores or in its CPU mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nxdt_align.batch import Batch
from nxdt_align.engines import steps, xla
from nxdt_align.engines.adapters import DROPOUT, AdapterRunner, Dropout
from nxdt_align.engines.base import Objective, StepOutput, WeightSource
from nxdt_align.engines.masters import MasterWeights
from nxdt_align.engines.nxd.adapters import adapt
from nxdt_align.engines.nxd.layers import parallelize
from nxdt_align.engines.nxd.mesh import Mesh
from nxdt_align.engines.nxd.pipeline import PipelineRunner
from nxdt_align.engines.nxd.saving import Checkpoints
from nxdt_align.engines.nxd.settings import Precision, SaveOptions, StaggeredLoad
from nxdt_align.engines.nxd.shards import Shards
from nxdt_align.engines.nxd.zero import ShardedOptimizer
from nxdt_align.engines.scoring import DecoderScorer, WholeRunner
from nxdt_align.engines.spread import SpreadEngine
from nxdt_align.models.adapters import AdapterSpec, Switch, use_trained
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.ops.attention import Attention, DenseAttention


class NxDEngine(SpreadEngine):
    """A decoder spread over tensor-parallel ranks and stages, and copies of it over data-parallel ranks.

    Parameters go by NxD's names (``named_parameters``), those of its checkpoints: ``weight_q`` for the
    plain model's ``q_proj.weight``, one ``gate_up_proj.weight`` for two.

    Args:
        config: the model's shape.
        mesh: this process among those that it is spread over.
        attention: how packed rows are attended over; of static shapes.
        precision: compute dtype, and whether float32 master weights are kept.
        reference_precision: that of the frozen reference; the policy's where None.
        save_options: the form of checkpoints.
        configure_model: called with each decoder that is built, before it is spread.
        staggered: ranks that load weights at the same time.
        adapters: what is trained instead of the model's weights, which then stay as they are loaded.
        seed: of the adapters' dropout.
    """

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        attention: Attention | None = None,
        precision: Precision = Precision(),  # noqa: B008 (frozen)
        reference_precision: Precision | None = None,
        save_options: SaveOptions = SaveOptions(),  # noqa: B008 (frozen)
        configure_model: Callable[[Decoder], None] = lambda model: None,
        staggered: StaggeredLoad = StaggeredLoad(),  # noqa: B008 (frozen)
        adapters: AdapterSpec | None = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.device = mesh.platform.device
        self.lazy = mesh.platform.backend != "cpu"
        self.topology = mesh.topology
        self._platform, self._parallel, self._groups = mesh.platform, mesh.parallel, mesh.groups
        self._data, self._ranks = mesh.groups.data, mesh.ranks
        self._attention = attention or DenseAttention()
        self._precision = precision
        self._reference_precision = reference_precision or precision
        self._configure, self._staggered = configure_model, staggered
        self._shards = Shards(config, mesh.parallel, mesh.groups, adapters)
        self._switch = None if adapters is None else Switch()
        self._policy = self._build(precision.compute, self._shards, self._switch)
        self._plain_runner = self._runner = self._runner_of(self._policy)
        self._dropout: Dropout | None = None
        if adapters is not None and self._switch is not None:
            self.keeps_start = True
            self._dropout = Dropout(adapters, seed, self.topology, self.device)
            self._runner = AdapterRunner(self._plain_runner, self._switch, on=True)
        # ZeRO-1 keeps float32 weights itself, this rank's rows of them.
        has_masters = precision.masters and not mesh.parallel.zero1
        self._masters = (
            MasterWeights(self._weights(), float32_sums=precision.float32_sums) if has_masters else None
        )
        if self._masters is not None:
            xla.make_data(dict(self._masters.named_parameters()))
        self._sharded: ShardedOptimizer | None = None
        self._mesh = mesh
        self._checkpoints = Checkpoints(mesh, save_options, self._shards.partition.stage_ends)

    def _build(self, dtype: torch.dtype, shards: Shards, switch: Switch | None = None) -> DecoderScorer:
        """A model without values: each rank then fills its shares only.

        Args:
            switch: of the adapters that ``shards`` has.
        """
        with torch.device("meta"):
            decoder = Decoder(self.config, self._attention)
        self._configure(decoder)
        decoder = decoder.to(dtype=dtype)
        parallelize(decoder, self._parallel, dtype, cpu_mode=self._platform.backend == "cpu")
        spec = shards.partition.adapters
        if spec is not None and switch is not None:
            adapt(decoder, shards.partition, spec, switch)
            use_trained(decoder, spec, switch)
        shards.materialize(decoder, self.device)
        shards.mark(decoder)
        # Not NxD's from_parallel_logits_to_logprobs, which keeps all logits and loses bf16's last digits.
        return DecoderScorer(decoder, self._attention, self._parallel, self._groups.tensor)

    def _runner_of(self, scorer: DecoderScorer) -> steps.Runner:
        if self._parallel.pipeline == 1:
            # A graph per micro-batch.
            return WholeRunner(scorer, self._platform.mark_step)
        local = [parameter for _, parameter in self._shards.named_parameters(scorer.decoder)]
        ends = self._shards.partition.stage_ends
        return PipelineRunner(scorer, local, ends, self._parallel, self._groups, self._platform)

    def _weights(self) -> list[tuple[str, nn.Parameter]]:
        """What is computed with and trained, which master weights stand above."""
        return [(n, p) for n, p in self._shards.named_parameters(self._policy.decoder) if p.requires_grad]

    def _all_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """With the frozen ones."""
        held = self._shards.named_parameters(self._policy.decoder)
        return [*((n, p) for n, p in held if not p.requires_grad), *self.named_parameters()]

    # Weights

    def load_weights(self, source: WeightSource) -> None:
        self._staggered.take(lambda: self._shards.fill(self._all_parameters(), source), self._ranks)
        self._weights_changed()

    def load_reference(self, source: WeightSource | None) -> None:
        if source is None and self._switch is not None:
            self._reference = AdapterRunner(self._plain_runner, self._switch, on=False)
            return
        shards = self._shards
        if self._switch is not None:
            shards = Shards(self.config, self._parallel, self._groups)
        reference = self._build(self._reference_precision.compute, shards)
        reference.requires_grad_(False)
        self._reference = self._runner_of(reference)
        parameters = shards.named_parameters(reference.decoder)
        if source is not None:
            self._staggered.take(lambda: shards.fill(parameters, source), self._ranks)
            return
        _copy(self.named_parameters(), parameters)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._masters.named_parameters()) if self._masters is not None else self._weights()

    def whole_parameters(self, *, trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        return self._shards.whole(self._all_parameters(), trainable=trainable)

    def adopt_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if not self._parallel.zero1:
            return optimizer
        self._sharded = ShardedOptimizer(optimizer, self._mesh, self._precision)
        return self._sharded

    def _weights_changed(self) -> None:
        """The weights that are computed with are the masters', rounded; on a lazy device they are data as
        well, where ``_sync_from_masters`` would be a graph."""
        if self._masters is not None:
            _copy(self._masters.named_parameters(), self._weights())
        self._stale = False

    # Forward and backward

    def step(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        self._computes("training step", micro_batches)
        # What the optimizer has recorded since the last step is a graph of its own.
        self._platform.mark_step()
        for _, parameter in (*self.named_parameters(), *self._weights()):
            parameter.grad = None
        if self._sharded is not None:
            self._sharded.zero_grad(set_to_none=True)
        self._sync_from_masters()
        batches = steps.with_reference(self._reference, micro_batches, objective)
        with nullcontext() if self._dropout is None else self._dropout.seeded():
            output = steps.forward_and_backward(self._runner, self._data, batches, objective)
        self._finish_gradients()
        self._stale = True  # the optimizer's step comes next
        return output

    def _finish_gradients(self) -> None:
        """Gradients of every parameter, summed over the ranks that have parts of them."""
        waiting = None if self._precision.float32_sums else self._masters
        if waiting is not None and self._precision.float32_reductions:
            waiting.take_gradients()
            waiting = None
        parameters = self.named_parameters() if waiting is None else self._weights()
        for _, parameter in parameters:
            if parameter.grad is None and not hasattr(parameter, "main_grad"):
                parameter.grad = torch.zeros_like(parameter)
        self._groups.tensor.sum(self._shards.partial_gradients(parameters))
        self._shards.sum_copies(parameters)
        if self._sharded is not None:
            self._sharded.reduce()
        else:
            self._data.sum([p.grad for _, p in parameters if p.grad is not None])
        if waiting is not None:
            waiting.take_gradients()

    def mark_step(self) -> None:
        """The end of a step: of the optimizer's, too."""
        # Here and not when they are needed next, so that all steps begin with the same graph.
        self._sync_from_masters()
        self._platform.mark_step()

    # Norms

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """As the contract says; not by NxD's clip_grad_norm, which counts replicated kv heads as often as
        they are replicated."""
        if self._sharded is None:
            gradients = [(n, p.grad) for n, p in self.named_parameters() if p.grad is not None]
            norm = self._shards.norm(gradients)
        else:
            names = {id(p): name for name, p in self.named_parameters()}
            rows = [(names[id(p)], gradient, first) for p, gradient, first in self._sharded.gradients()]
            gradients = [(name, gradient) for name, gradient, _ in rows]
            norm = self._shards.norm_of_rows(rows)
        if max_norm is not None:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for _, gradient in gradients:
                gradient.mul_(factor)
        return norm

    def parameter_norm(self) -> Tensor:
        return self._shards.norm(self.named_parameters())

    # Checkpoints

    def save(
        self,
        directory: Path,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> None:
        if self._dropout is not None:
            extra = {**extra, DROPOUT: self._dropout.steps}
        self._checkpoints.save(directory, self.named_parameters(), optimizer, extra, background=background)

    def finish_saving(self) -> None:
        self._checkpoints.finish()

    def once_saved(self, action: Callable[[], None]) -> None:
        self._checkpoints.then(action)

    def read_extra(self, directory: Path) -> dict[str, Any]:
        return self._checkpoints.read_extra(directory)

    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        with nullcontext() if optimizer is None else xla.state_as_computed(optimizer):
            extra = self._checkpoints.load(directory, self.named_parameters(), optimizer)
            self._weights_changed()
        if self._dropout is not None:
            self._dropout.steps = int(extra.get(DROPOUT, 0))
        return extra


@torch.no_grad()
def _copy(source: Iterable[tuple[str, nn.Parameter]], target: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Give parameters the values of those of the same names."""
    values = dict(source)
    for name, parameter in target:
        with xla.filling({name: parameter}) as filled:
            filled[name].copy_(values[name])
