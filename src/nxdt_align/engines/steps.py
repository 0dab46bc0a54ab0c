"""One global batch through a model that is spread over ranks: what every engine does in the same way.

An engine brings a ``Runner``, which sends micro-batches through its layers wherever they are, and the
``Group`` of the ranks that see other rows of the global batch (``ranks`` below).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nxdt_align.batch import Batch, TokenStatistic
from nxdt_align.engines.base import EngineError, Objective, StepOutput
from nxdt_align.engines.ranks import Group


class RouterLoss(NamedTuple):
    """A micro-batch's share of the router's balancing loss, () float32 each."""

    weighted: Tensor
    """What is added to the objective's loss, with gradient."""
    value: Tensor
    """Without its weight, and without gradient."""


ROUTER_LOSS = "router_aux_loss"
"""Name of its metric."""


class TokenLogps(NamedTuple):
    """What a model says of a micro-batch's response tokens."""

    logps: Tensor
    """(B, T) float32, nats; 0 where there is no label."""
    statistics: tuple[Tensor, ...] = ()
    """(B, T) float32 for each of what was asked for beside them, without gradient."""
    logits: Tensor | None = None
    """(B, T, V) float32, with gradient, where they were asked for; 0 where there is no label."""
    router: RouterLoss | None = None
    """Of a mixture of experts that balances its router, in a forward pass with gradients."""

    @property
    def of_tokens(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """What an objective reads."""
        return self.logps, self.statistics, self.logits

    def detach(self) -> TokenLogps:
        """What is told of a micro-batch when its backward pass is over: no logits."""
        return TokenLogps(self.logps.detach(), tuple(statistic.detach() for statistic in self.statistics))


Share = Callable[[int, TokenLogps], Tensor]
"""(micro-batch's index, its log-probs with their graph) -> the scalar that backward starts from."""


class Runner(Protocol):
    """Sends micro-batches through a model. All ranks that share the rows make the same calls."""

    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        """Without gradients, one result per micro-batch, the same on every rank that shares the rows
        (on all pipeline stages, too)."""
        ...

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        """Forward and backward; gradients are *added* to the parameters' and not yet summed over
        data-parallel ranks. Returns what ``forward`` would, detached.

        ``share`` is called once for each micro-batch, in their order, on the ranks that hold the last
        layers and on no others; the scalars add up to the loss, so they are not averaged.
        """
        ...


def slot_logps(runner: Runner | None, micro_batches: Sequence[Batch]) -> list[Tensor]:
    """Each slot's log-probability without gradients: (B, R) float32 for each micro-batch.

    Args:
        runner: the policy's or the reference's. Raises EngineError for None, a reference that is not there.
    """
    if runner is None:
        raise EngineError("reference log-probs were asked for, but no reference model was loaded")
    results = runner.forward(micro_batches, wanted=())
    return [batch.sum_logps(result.logps) for batch, result in zip(micro_batches, results, strict=True)]


def with_reference(
    reference: Runner | None, micro_batches: Sequence[Batch], objective: Objective
) -> Sequence[Batch]:
    """The micro-batches with the reference's log-probs, where the objective needs them.

    Those of a step all bring them, from the reference store, or none does. The reference is asked for all
    of a step in one call, never for some: each number of micro-batches is a pipeline's schedule and a lazy
    device's graph of its own, and under FSDP every data-parallel rank must make the same calls.
    """
    if not objective.needs_reference or all(b.reference_logps is not None for b in micro_batches):
        return micro_batches
    found = slot_logps(reference, micro_batches)
    return [batch.with_reference(logps) for batch, logps in zip(micro_batches, found, strict=True)]


def forward_and_backward(
    runner: Runner, ranks: Group, micro_batches: Sequence[Batch], objective: Objective
) -> StepOutput:
    """Loss and metrics of the global batch; this rank's share of the gradients is in the parameters.

    ``micro_batches`` carry reference log-probabilities where the objective needs them.
    """
    if objective.couples_examples:
        output, gradients = couple(runner, ranks, micro_batches, objective, training=True)

        balances: list[Tensor] = []

        def surrogate(index: int, result: TokenLogps) -> Tensor:
            loss = objective.surrogate(micro_batches[index], result.logps, gradients[index])
            if result.router is None:
                return loss
            balances.append(result.router.value)
            return loss + result.router.weighted

        runner.backward(micro_batches, surrogate, wanted=())
        if not balances:
            return output
        balance = torch.stack(balances).sum()
        ranks.sum([balance])
        return replace(output, metrics={**output.metrics, ROUTER_LOSS: balance})

    shares: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def share(index: int, result: TokenLogps) -> Tensor:
        loss, metrics = objective(micro_batches[index], *result.of_tokens)
        if result.router is not None:
            metrics = {**metrics, ROUTER_LOSS: result.router.value}
        shares[index] = loss.detach(), metrics
        return loss if result.router is None else loss + result.router.weighted

    results = runner.backward(micro_batches, share, wanted=objective.wanted)
    with torch.no_grad():
        # Ranks without the last layers work the metrics out from the log-probs that they are told.
        every = [shares.get(i) or objective(b, *results[i].of_tokens) for i, b in enumerate(micro_batches)]
    return total(ranks, every)


@torch.no_grad()
def evaluate(
    runner: Runner, ranks: Group, micro_batches: Sequence[Batch], objective: Objective
) -> StepOutput:
    """As ``forward_and_backward``, without gradients."""
    if objective.couples_examples:
        return couple(runner, ranks, micro_batches, objective, training=False)[0]
    results = runner.forward(micro_batches, wanted=objective.wanted)
    return total(ranks, [objective(b, *r.of_tokens) for b, r in zip(micro_batches, results, strict=True)])


@torch.no_grad()
def couple(
    runner: Runner,
    ranks: Group,
    micro_batches: Sequence[Batch],
    objective: Objective,
    *,
    training: bool,
) -> tuple[StepOutput, Sequence[Tensor]]:
    """Loss and metrics of a global batch whose examples the loss couples, and while training the gradients
    of each micro-batch's slots, (B * R, 2)."""
    results = runner.forward(micro_batches, wanted=objective.wanted)
    tables = [objective.statistics(b, *r.of_tokens) for b, r in zip(micro_batches, results, strict=True)]
    everyone = ranks.gather(torch.cat(tables))
    loss, metrics, gradients = objective.couple(everyone.flatten(0, 1), micro_batches[0], training=training)
    if gradients is None:
        return StepOutput(loss=loss, metrics=metrics), []
    mine = gradients.view(*everyone.shape[:2], -1)[ranks.rank if len(everyone) > 1 else 0]
    return StepOutput(loss=loss, metrics=metrics), torch.split(mine, [len(table) for table in tables])


def total(ranks: Group, shares: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> StepOutput:
    """Add up the micro-batches' shares, over the data-parallel ranks too, in one reduction."""
    names = sorted(shares[0][1])
    values = torch.stack([torch.stack([loss.float(), *(m[n].float() for n in names)]) for loss, m in shares])
    summed = values.sum(0)
    ranks.sum([summed])
    return StepOutput(loss=summed[0], metrics=dict(zip(names, summed[1:], strict=True)))
