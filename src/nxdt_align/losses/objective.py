"""From a loss to what an engine runs: shares of a global mean, and shares of its metrics.

Legend: ``P`` examples of a micro-batch: pairs, or single responses for SFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxdt_align.batch import Batch
from nxdt_align.losses.types import Loss, LossOutput, ResponseLogps


class GlobalMeanObjective:
    """A loss as a mean over the global batch, computed one micro-batch at a time.

    Each result is already divided by the global batch's size, so results of all micro-batches and
    data-parallel ranks *add up* to the true means, however the batch was split, and gradients do too.
    The loss is a mean over what ``normaliser`` says ("pairs" or "tokens"), metrics are means over
    examples. Shapes are static and nothing branches on a tensor's value.

    Raises ValueError for a loss that no engine can serve.
    """

    def __init__(self, loss: Loss) -> None:
        if loss.needs_logits:
            raise ValueError(
                f"{loss} reads logits, which are never kept: log-probabilities are computed in chunks. "
                "Choose a loss of log-probabilities"
            )
        if loss.couples_examples:
            raise ValueError(
                f"{loss} couples the examples of a global batch, so its value would depend on the split "
                "into micro-batches. Choose a loss that treats each example by itself"
            )
        self.loss = loss
        self.needs_reference = loss.needs_reference
        self.needs_collisions = loss.needs_collisions
        self.normaliser = loss.normaliser

    def __call__(
        self, batch: Batch, token_logps: Tensor, collisions: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, () float32, and of each metric, () float32 detached.

        ``token_logps`` and ``collisions``: (B, T) float32. Raises ValueError where the loss needs
        reference log-probabilities or collisions and there are none.
        """
        if self.needs_collisions and collisions is None:
            raise ValueError(f"{self.loss} needs the log of summed squared probabilities, but got none")
        policy = ResponseLogps.from_tokens(batch, token_logps, collisions, self.loss.needs_tokens)
        output = self.loss(policy, self._reference(batch, policy))
        valid = policy.valid[0::2] & policy.valid[1::2] if self.loss.paired else policy.valid
        _check_shapes(self.loss, output, valid)
        # Engines may hand scalars on expanded to the rows.
        pairs, tokens = batch.global_pairs.reshape(-1)[0], batch.global_tokens.reshape(-1)[0]
        share = _masked_sum(output.losses, valid) / (tokens if self.normaliser == "tokens" else pairs)
        with torch.no_grad():
            values = _metric_values(policy, output)
            metrics = {name: _masked_sum(value, valid) / pairs for name, value in values.items()}
        return share, metrics

    def _reference(self, batch: Batch, policy: ResponseLogps) -> ResponseLogps | None:
        if not self.needs_reference:
            return None
        if batch.reference_logps is None:
            raise ValueError(
                f"{self.loss} needs the reference's log-probabilities, but the batch carries none: they "
                "come from the reference store, or from the engine's frozen reference"
            )
        return policy.with_sums(batch.reference_logps)


def _metric_values(policy: ResponseLogps, output: LossOutput) -> dict[str, Tensor]:
    """Metrics an example, (P,) each: NxDT's names, TRL's names, then the loss's own."""
    values: dict[str, Tensor] = {}
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    if chosen is not None and rejected is not None:
        values = {
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": policy.chosen_logps,
            "logps/rejected": policy.rejected_logps,
        }
    return {**values, **output.extras}


def _masked_sum(values: Tensor, valid: Tensor) -> Tensor:
    # where, not a product: NaN * 0 is NaN.
    return torch.where(valid, values.float(), 0.0).sum()


def _check_shapes(loss: Loss, output: LossOutput, valid: Tensor) -> None:
    """A loss from outside that returns a scalar would broadcast, and be wrong by a factor."""
    wanted = {"losses": output.losses, **output.extras}
    if output.chosen_rewards is not None and output.rejected_rewards is not None:
        wanted |= {"chosen_rewards": output.chosen_rewards, "rejected_rewards": output.rejected_rewards}
    for name, value in wanted.items():
        if value.shape != valid.shape:
            raise ValueError(
                f"{loss} must return {name} with one value an example, shape {tuple(valid.shape)}, "
                f"but returned shape {tuple(value.shape)}"
            )
