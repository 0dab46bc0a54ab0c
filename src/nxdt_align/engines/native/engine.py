"""The native engine: the plain Llama on PyTorch's own devices, data parallel over processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nxdt_align.batch import Batch, Topology
from nxdt_align.engines import steps
from nxdt_align.engines.base import Engine, EngineError, Objective, StepOutput, WeightSource
from nxdt_align.engines.native import checkpoint, collectives
from nxdt_align.engines.native.collectives import Group
from nxdt_align.engines.native.gathering import whole_tensors
from nxdt_align.engines.native.loading import fill
from nxdt_align.engines.native.precision import MasterWeights, Precision
from nxdt_align.engines.native.saving import Saver
from nxdt_align.engines.native.scoring import Scorer, WholeRunner
from nxdt_align.models.llama import Llama
from nxdt_align.models.presets import LlamaConfig
from nxdt_align.ops.attention import Attention


class NativeEngine(Engine):
    """One whole model a process; gradients are summed over the processes.

    Args:
        config: the model's shape.
        attention: how packed rows are attended over.
        precision: compute dtype; float32 master weights are kept below it.
        topology: this process's place among the data-parallel ranks.
        device: where the model lives.
        configure_model: called with each Llama that is built, e.g. to set activation checkpointing.
    """

    def __init__(
        self,
        config: LlamaConfig,
        attention: Attention,
        *,
        precision: Precision = Precision(),  # noqa: B008 (frozen)
        topology: Topology = Topology(),  # noqa: B008 (frozen)
        device: torch.device | str = "cpu",
        configure_model: Callable[[Llama], None] = lambda model: None,
    ) -> None:
        self.topology = topology
        self.device = torch.device(device)
        self.config = config
        self._attention = attention
        self._precision = precision
        self._configure = configure_model
        self._data_ranks = Group(topology.data_parallel_rank, topology.data_parallel_size)
        self._policy = self._build()
        self._masters = MasterWeights(self._policy.llama) if precision.has_masters else None
        self._is_behind = True
        self._reference: Scorer | None = None
        self._saver = Saver()

    def _build(self) -> Scorer:
        """A model without values: they are loaded, so initialising them would be wasted."""
        with torch.device("meta"):
            llama = Llama(self.config, self._attention)
        self._configure(llama)
        llama = llama.to(dtype=self._precision.compute).to_empty(device=self.device)
        return Scorer(llama, self._attention, self._precision, self.device)

    # Weights

    def load_weights(self, source: WeightSource) -> None:
        fill(self.named_parameters(), source)
        self._is_behind = True
        self._publish()

    def load_reference(self, source: WeightSource | None) -> None:
        if source is None:
            self._reference = copy.deepcopy(self._policy)
        else:
            self._reference = self._build()
            fill(self._reference.llama.named_parameters(), source)
        self._reference.requires_grad_(False)

    def drop_reference(self) -> None:
        self._reference = None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        owner = self._masters if self._masters is not None else self._policy.llama
        return list(owner.named_parameters())

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return whole_tensors(self.named_parameters(), self._saver.ranks())

    def _publish(self) -> None:
        """Bring the weights that are computed with up to the masters, where those may have moved."""
        if self._masters is not None and self._is_behind:
            self._masters.publish()
        self._is_behind = False

    # Forward and backward

    def step(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        for _, parameter in self.named_parameters():
            parameter.grad = None
        self._publish()
        batches = self._with_reference(micro_batches, objective)
        output = steps.forward_and_backward(WholeRunner(self._policy), self._data_ranks, batches, objective)
        parameters = [p for _, p in self.named_parameters()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._data_ranks.sum([p.grad for p in parameters if p.grad is not None])
        self._is_behind = True  # the optimizer's step comes next
        return output

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        self._publish()
        batches = self._with_reference(micro_batches, objective)
        return steps.evaluate(WholeRunner(self._policy), self._data_ranks, batches, objective)

    def response_logps(self, batch: Batch, *, reference: bool = False) -> Tensor:
        self._publish()
        if reference and self._reference is None:
            raise EngineError("reference log-probs were asked for, but no reference model was loaded")
        scorer = self._reference if reference and self._reference is not None else self._policy
        (result,) = WholeRunner(scorer).forward([batch], want_collisions=False)
        return batch.sum_logps(result.logps)

    def _with_reference(self, micro_batches: Sequence[Batch], objective: Objective) -> list[Batch]:
        if not objective.needs_reference:
            return list(micro_batches)
        return [
            b if b.reference_logps is not None else b.with_reference(self.response_logps(b, reference=True))
            for b in micro_batches
        ]

    # Norms

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        parameters = [p for _, p in self.named_parameters()]
        limit = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_(parameters, limit).float()

    @torch.no_grad()
    def parameter_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p for _, p in self.named_parameters()]).float()

    # Ranks

    def all_gather(self, value: Tensor) -> Tensor:
        return self._data_ranks.gather(value)

    def broadcast_object(self, value: Any) -> Any:
        return collectives.broadcast_object(value)

    def barrier(self) -> None:
        collectives.barrier()

    # Checkpoints

    def save(
        self,
        directory: Path,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> None:
        self._saver.save(directory, self.named_parameters(), optimizer, extra, background=background)

    def finish_saving(self) -> None:
        self._saver.finish()

    def once_saved(self, action: Callable[[], None]) -> None:
        self._saver.then(action)

    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        self._saver.finish()
        extra = checkpoint.load(directory, self.named_parameters(), optimizer)
        self._is_behind = True
        self._publish()
        return extra
