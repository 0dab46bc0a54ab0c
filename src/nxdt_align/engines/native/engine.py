"""The native engine: the plain Llama on PyTorch's own devices, data parallel over processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nxdt_align.batch import Batch, Topology
from nxdt_align.engines.base import Engine, EngineError, Objective, StepOutput, WeightSource
from nxdt_align.engines.native import checkpoint, collectives
from nxdt_align.engines.native.precision import MasterWeights, Precision
from nxdt_align.models.llama import Llama
from nxdt_align.models.presets import LlamaConfig
from nxdt_align.ops.attention import Attention
from nxdt_align.ops.logprobs import token_logps
from nxdt_align.ops.ragged import RaggedRow


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
        self._model = self._build()
        self._masters = MasterWeights(self._model) if precision.has_masters else None
        self._is_behind = True
        self._reference: Llama | None = None

    def _build(self) -> Llama:
        """A model without values: they are loaded, so initialising them would be wasted."""
        with torch.device("meta"):
            model = Llama(self.config, self._attention)
        self._configure(model)
        return model.to(dtype=self._precision.compute).to_empty(device=self.device)

    # Weights

    def load_weights(self, source: WeightSource) -> None:
        _fill(dict(self.named_parameters()), source)
        self._is_behind = True
        self._publish()

    def load_reference(self, source: WeightSource | None) -> None:
        if source is None:
            self._reference = copy.deepcopy(self._model)
        else:
            self._reference = self._build()
            _fill(dict(self._reference.named_parameters()), source)
        self._reference.requires_grad_(False)

    def drop_reference(self) -> None:
        self._reference = None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        owner = self._masters if self._masters is not None else self._model
        return list(owner.named_parameters())

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
        output = self._backward(micro_batches, objective)
        parameters = [p for _, p in self.named_parameters()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        collectives.sum_tensors([p.grad for p in parameters if p.grad is not None])
        self._is_behind = True  # the optimizer's step comes next
        return output

    def _backward(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        if objective.couples_examples:
            return self._backward_coupled(micro_batches, objective)
        shares = []
        for batch in micro_batches:
            share = self._apply(self._with_reference(batch, objective), objective)
            share[0].backward()  # type: ignore[no-untyped-call]
            shares.append((share[0].detach(), share[1]))
        return _total(shares)

    def _backward_coupled(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        output, gradients = self._couple(micro_batches, objective, training=True)
        for batch, rows in zip(micro_batches, gradients, strict=True):
            logps, _ = self._token_logps(self._model, batch, want_collisions=False)
            objective.surrogate(batch, logps, rows).backward()  # type: ignore[no-untyped-call]
        return output

    @torch.no_grad()
    def _couple(
        self, micro_batches: Sequence[Batch], objective: Objective, *, training: bool
    ) -> tuple[StepOutput, Sequence[Tensor]]:
        """Loss and metrics of the whole global batch, and the gradients of each micro-batch's slots."""
        tables = []
        for batch in micro_batches:
            logps, collisions = self._token_logps(self._model, batch, objective.needs_collisions)
            tables.append(objective.statistics(self._with_reference(batch, objective), logps, collisions))
        everyone = collectives.gather(torch.cat(tables))
        loss, metrics, gradients = objective.couple(
            everyone.flatten(0, 1), micro_batches[0], training=training
        )
        place = self.topology.data_parallel_rank if len(everyone) > 1 else 0
        mine = gradients.view(*everyone.shape[:2], -1)[place]
        return StepOutput(loss=loss, metrics=metrics), torch.split(mine, [len(table) for table in tables])

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        self._publish()
        if objective.couples_examples:
            return self._couple(micro_batches, objective, training=False)[0]
        return _total([self._apply(self._with_reference(b, objective), objective) for b in micro_batches])

    @torch.no_grad()
    def response_logps(self, batch: Batch, *, reference: bool = False) -> Tensor:
        self._publish()
        model = self._reference_model() if reference else self._model
        logps, _ = self._token_logps(model, batch, want_collisions=False)
        return batch.sum_logps(logps)

    def _apply(self, batch: Batch, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
        logps, collisions = self._token_logps(self._model, batch, objective.needs_collisions)
        return objective(batch, logps, collisions)

    def _with_reference(self, batch: Batch, objective: Objective) -> Batch:
        if not objective.needs_reference or batch.reference_logps is not None:
            return batch
        return batch.with_reference(self.response_logps(batch, reference=True))

    def _token_logps(self, model: Llama, batch: Batch, want_collisions: bool) -> tuple[Tensor, Tensor | None]:
        if not self._attention.static_shapes:
            return self._ragged_logps(model, RaggedRow.of(batch), want_collisions)
        with self._precision.context(self.device):
            context = self._attention.prepare(batch.segment_ids)
            hidden = model(batch.input_ids, batch.position_ids, context)
        # Outside of autocast, so that the head's product is accumulated in float32.
        index = batch.response_positions[:, :, None].expand(-1, -1, hidden.shape[-1])
        at_responses = hidden.gather(1, index)
        return token_logps(
            at_responses.float() if self._precision.autocast else at_responses,
            model.head_weight,
            batch.labels,
            compact=self.device.type == "cpu",
            want_collisions=want_collisions,
        )

    def _ragged_logps(
        self, model: Llama, row: RaggedRow, want_collisions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As ``_token_logps``, over the batch's real tokens alone."""
        with self._precision.context(self.device):
            context = self._attention.prepare(row.segment_ids)
            hidden = model(row.input_ids, row.position_ids, context)[0]
        at_responses = hidden.index_select(0, row.response_positions)
        logps, collisions = token_logps(
            at_responses.float() if self._precision.autocast else at_responses,
            model.head_weight,
            row.labels,
            want_collisions=want_collisions,
        )
        return row.spread(logps), None if collisions is None else row.spread(collisions)

    def _reference_model(self) -> Llama:
        if self._reference is None:
            raise EngineError("reference log-probs were asked for, but no reference model was loaded")
        return self._reference

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
        return collectives.gather(value)

    def broadcast_object(self, value: Any) -> Any:
        return collectives.broadcast_object(value)

    def barrier(self) -> None:
        collectives.barrier()

    # Checkpoints

    def save(
        self, directory: Path, optimizer: torch.optim.Optimizer | None, extra: Mapping[str, Any]
    ) -> None:
        checkpoint.save(
            directory, self.named_parameters(), optimizer, extra, is_writer=self.topology.rank == 0
        )

    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        extra = checkpoint.load(directory, self.named_parameters(), optimizer)
        self._is_behind = True
        self._publish()
        return extra


@torch.no_grad()
def _fill(parameters: Mapping[str, nn.Parameter], source: WeightSource) -> None:
    """Copy every tensor of ``source``; all that does not fit is reported at once."""
    there, wanted = set(source.names()), set(parameters)
    faults = [f"missing: {name}" for name in sorted(wanted - there)]
    faults += [f"not in the model: {name}" for name in sorted(there - wanted)]
    for name in sorted(there & wanted):
        have, want = tuple(source.shape(name)), tuple(parameters[name].shape)
        if have != want:
            faults.append(f"{name} has shape {list(have)}, but the model has {list(want)}")
    if faults:
        shown = "\n  ".join(faults)
        raise EngineError(
            f"{source} does not fit the model ({len(faults)} tensors):\n  {shown}\n"
            "model.model_config, model.num_layers and model.hidden_size must be those of the weights"
        )
    for name, parameter in parameters.items():
        parameter.copy_(source.read(name))


def _total(shares: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> StepOutput:
    """Add up the micro-batches' shares, over all ranks, in one reduction."""
    names = sorted(shares[0][1])
    values = torch.stack([torch.stack([loss.float(), *(m[n].float() for n in names)]) for loss, m in shares])
    total = values.sum(0)
    collectives.sum_tensors([total])
    return StepOutput(loss=total[0], metrics=dict(zip(names, total[1:], strict=True)))
