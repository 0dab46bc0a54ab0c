"""Turns a loss into what an engine runs: a micro-batch's share of the global mean and of each metric.

Legend: ``P`` examples of a micro-batch: pairs, or single responses for SFT. ``N`` slots of a global
batch, ``K`` columns of its table (``coupling.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nxdt_align.batch import TOKEN_STATISTICS, Batch, TokenStatistic
from nxdt_align.config.alignment import OBJECTIVES, ModelAlignmentStrategyConfig
from nxdt_align.errors import UserError
from nxdt_align.losses import coupling
from nxdt_align.losses.metrics import example_metrics, finish
from nxdt_align.losses.types import Loss, LossOutput, ResponseLogps


@runtime_checkable
class RememberingLoss(Protocol):
    """A loss with state across steps, such as BCO's running mean."""

    def initial_state(self) -> Tensor | None:
        """The state before the first step; None for none."""
        ...

    def next_state(self, state: Tensor, policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor: ...

    def with_state(self, state: Tensor) -> Loss: ...


def build_loss(strategy: ModelAlignmentStrategyConfig) -> Loss:
    """The loss of the chosen objective, built from its section. Raises ConfigError for an invalid section
    that was not checked before."""
    name = OBJECTIVES[strategy.objective]["loss"].partition(".")[2]
    loss: Loss = getattr(importlib.import_module(_module_of(strategy.objective)), name)(strategy.active)
    return loss


def _modules_of_ours() -> set[str]:
    return {_module_of(objective) for objective in OBJECTIVES}


def _module_of(objective: str) -> str:
    return f"nxdt_align.losses.{OBJECTIVES[objective]['loss'].partition('.')[0]}"


class GlobalMeanObjective:
    """A loss as a mean over the global batch, computed one micro-batch at a time.

    Each result is already divided by the global batch's size, so the results of all micro-batches and
    data-parallel ranks *add up* to the true means for any split of the batch, and so do gradients. The loss
    is a mean over ``normaliser`` ("pairs" or "tokens"); metrics are means over examples. Shapes are static
    and nothing branches on a tensor's value.

    If ``couples_examples``, an engine uses ``statistics``, ``couple`` and ``surrogate`` instead.

    Args:
        token_statistics: also report TRL's statistics of the responses' tokens: entropy, mean logits, and
            the top-1 accuracy of the labels.

    Raises UserError for a loss that no engine supports.
    """

    def __init__(self, loss: Loss, *, token_statistics: bool = False) -> None:
        if loss.couples_examples and loss.needs_logits:
            raise UserError(
                f"{loss} couples the examples of a global batch and reads logits; only sums per response are "
                "gathered. Choose one of the two"
            )
        if loss.couples_examples and loss.needs_tokens:
            raise UserError(
                f"{loss} couples the examples of a global batch and wants each token's log-probability; "
                "only sums per response are gathered. Choose one of the two"
            )
        if loss.couples_examples and loss.needs_prompts:
            raise UserError(
                f"{loss} couples the examples of a global batch and wants the prompts' log-probabilities; "
                "only those of responses are gathered. Choose one of the two"
            )
        self.loss = loss
        self.needs_reference = loss.needs_reference
        self.needs_logits = loss.needs_logits
        self._statistics = TOKEN_STATISTICS if token_statistics else ()
        collisions: tuple[TokenStatistic, ...] = ("collisions",) if loss.needs_collisions else ()
        logits: tuple[TokenStatistic, ...] = ("logits",) if loss.needs_logits else ()
        self._named = collisions + self._statistics
        self.wanted: Sequence[TokenStatistic] = self._named + logits
        """Token statistics computed at the head beside the log-probabilities."""
        self.needs_prompts = loss.needs_prompts
        """Whether batches must predict the prompts' tokens too."""
        self.couples_examples = loss.couples_examples
        self.calls_own_code = type(loss).__module__ not in _modules_of_ours()
        self.normaliser = loss.normaliser
        self.state = loss.initial_state() if isinstance(loss, RememberingLoss) else None
        """The loss's state across steps, saved in checkpoints."""

    def __call__(
        self,
        batch: Batch,
        token_logps: Tensor,
        token_statistics: Sequence[Tensor] = (),
        logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, () float32, and of each metric, () float32 detached.

        ``token_logps``: (B, T) float32, and so is each of ``token_statistics``, in the order of ``wanted``;
        ``logits``: (B, T, V) float32. Raises ValueError if reference log-probabilities, token_statistics or
        logits are missing, or if the loss couples the batch's examples.
        """
        if self.couples_examples:
            raise ValueError(
                f"{self.loss} couples the examples of a global batch: it has no value for a micro-batch alone"
            )
        policy = self._policy(batch, token_logps, token_statistics, logits)
        output = self.loss(policy, self._reference(batch, policy))
        return self._shares(policy, output, batch)

    @staticmethod
    def finish(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Metrics to report, see ``metrics.finish``."""
        return finish(metrics)

    # A loss that couples the batch's examples

    def statistics(
        self,
        batch: Batch,
        token_logps: Tensor,
        token_statistics: Sequence[Tensor] = (),
        logits: Tensor | None = None,
    ) -> Tensor:
        """(B * R, K) float32: the loss's inputs from a micro-batch's slots, without gradients."""
        policy = self._policy(batch, token_logps.detach(), token_statistics)
        return coupling.to_table(policy, self._reference(batch, policy))

    def couple(
        self, table: Tensor, batch: Batch, *, training: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Loss and metrics of the whole global batch, and (N, 2) gradients of its slots' log-probs, None
        where it is not ``training``.

        ``table``: (N, K), the statistics of all micro-batches and ranks in any fixed order; ``batch``:
        any of the micro-batches, for the global counts. ``training`` updates the loss's state.
        """
        # No gradients unless needed: autograd's thread may free its last tensor after the step is marked, and
        # on a lazy device every tensor alive at that moment becomes an output of the graph.
        with torch.set_grad_enabled(training):
            policy, reference = coupling.from_table(table, self._statistics)
            output = self._loss_now(policy, reference, training)(policy, reference)
            share, metrics = self._shares(policy, output, batch)
            gradients = coupling.gradients_of(share, policy) if training else None
        return share.detach(), metrics, gradients

    def surrogate(self, batch: Batch, token_logps: Tensor, gradients: Tensor) -> Tensor:
        """A scalar with the coupled loss's gradient, from this micro-batch's rows of ``gradients``."""
        return coupling.surrogate(ResponseLogps.from_tokens(batch, token_logps), gradients)

    def _loss_now(self, policy: ResponseLogps, reference: ResponseLogps, training: bool) -> Loss:
        if self.state is None or not isinstance(self.loss, RememberingLoss):
            return self.loss
        state = self.state.to(policy.sums.device)
        if training:
            self.state = state = self.loss.next_state(state, policy, reference)
        return self.loss.with_state(state)

    # Parts

    def _policy(
        self,
        batch: Batch,
        token_logps: Tensor,
        token_statistics: Sequence[Tensor],
        logits: Tensor | None = None,
    ) -> ResponseLogps:
        if len(token_statistics) != len(self._named) or (self.needs_logits and logits is None):
            got = len(token_statistics) + (logits is not None)
            raise ValueError(
                f"{self.loss} needs {len(self.wanted)} values per token beside its log-probability "
                f"({', '.join(self.wanted)}), but got {got}"
            )
        named = dict(zip(self._named, token_statistics, strict=True))
        return ResponseLogps.from_tokens(
            batch, token_logps, named, self.loss.needs_tokens, self.needs_prompts, logits
        )

    def _reference(self, batch: Batch, policy: ResponseLogps) -> ResponseLogps | None:
        if not self.needs_reference:
            return None
        if batch.reference_logps is None:
            raise ValueError(
                f"{self.loss} needs the reference's log-probabilities, but the batch carries none: they "
                "come from the reference store, or from the engine's frozen reference"
            )
        return policy.with_sums(batch.reference_logps)

    def _shares(
        self, policy: ResponseLogps, output: LossOutput, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        valid = policy.valid[0::2] & policy.valid[1::2] if self.loss.paired else policy.valid
        _check_shapes(self.loss, output, valid)
        # Engines may have expanded these scalars to one per row.
        pairs, tokens = batch.global_pairs.reshape(-1)[0], batch.global_tokens.reshape(-1)[0]
        share = _masked_sum(output.losses, valid) / (tokens if self.normaliser == "tokens" else pairs)
        with torch.no_grad():
            values = example_metrics(policy, output, paired=self.loss.paired)
            metrics = {name: _masked_sum(value, valid) / pairs for name, value in values.items()}
        return share, metrics


def _masked_sum(values: Tensor, valid: Tensor) -> Tensor:
    # where, not a product: NaN * 0 is NaN, in the gradient too.
    return torch.where(valid, values.float(), 0.0).sum()


def _check_shapes(loss: Loss, output: LossOutput, valid: Tensor) -> None:
    """A custom loss that returns a scalar would broadcast and be wrong by a factor."""
    wanted = {"losses": output.losses, **output.extras}
    if output.chosen_rewards is not None and output.rejected_rewards is not None:
        wanted |= {"chosen_rewards": output.chosen_rewards, "rejected_rewards": output.rejected_rewards}
    for name, value in wanted.items():
        if value.shape != valid.shape:
            raise ValueError(
                f"{loss} must return {name} with one value per example, shape {tuple(valid.shape)}, "
                f"but returned shape {tuple(value.shape)}"
            )
