"""Metrics per example, and their final reduction.

A metric over a subset of the examples (e.g. accuracy where the chosen response is longer) is the quotient of
two means over all examples, so that it adds up over micro-batches, ranks and steps like any other: the
divisor is stored under the metric's name plus ``DIVISOR``, and ``finish`` divides.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nxdt_align.batch import SlotRole, TokenStatistic
from nxdt_align.losses.types import LossOutput, ResponseLogps

DIVISOR = " (divisor)"


def example_metrics(policy: ResponseLogps, output: LossOutput, *, paired: bool) -> dict[str, Tensor]:
    """Metrics per example, (P,) each: under NxDT's names and TRL's, ours on lengths, then the loss's extras.

    ``paired``: slots 2k and 2k+1 are one example.
    """
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    values: dict[str, Tensor] = {}
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
            **_length_metrics(policy, (chosen > rejected).float()),
        }
    if policy.statistics:
        values |= _pair_statistics(policy) if paired else _single_statistics(policy)
    return {**values, **output.extras}


def _pair_statistics(policy: ResponseLogps) -> dict[str, Tensor]:
    """TRL's statistics as means over the global batch's tokens: of chosen (or desirable) responses, of
    rejected ones, and of both. Mismatched completions are excluded."""
    is_single = policy.roles == SlotRole.SINGLE
    is_chosen = (policy.roles == SlotRole.CHOSEN) | (is_single & policy.desirable)
    is_rejected = (policy.roles == SlotRole.REJECTED) | (is_single & ~policy.desirable)

    def mean(name: str, statistic: TokenStatistic, those: Tensor) -> dict[str, Tensor]:
        return _mean(name, policy.statistics[statistic] * those, policy.counts * those)

    values = {
        **mean("logits/chosen", "mean_logit", is_chosen),
        **mean("logits/rejected", "mean_logit", is_rejected),
        **mean("mean_token_accuracy", "is_top1", is_chosen),
        **mean("entropy", "entropy", is_chosen | is_rejected),
    }
    # Two slots per example; masked ones are 0.
    return {name: slots.view(-1, 2).sum(1) for name, slots in values.items()}


def _single_statistics(policy: ResponseLogps) -> dict[str, Tensor]:
    return {
        **_mean("mean_token_accuracy", policy.statistics["is_top1"], policy.counts),
        **_mean("entropy", policy.statistics["entropy"], policy.counts),
    }


def _mean(name: str, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    return {name: sums, name + DIVISOR: counts}


def _length_metrics(policy: ResponseLogps, correct: Tensor) -> dict[str, Tensor]:
    """Metrics that tell length bias (accuracy is high only where the chosen response is longer) from
    likelihood displacement (chosen log-probs per token fall while margins grow)."""
    mean = policy.mean_logps.detach()
    values = {"logps/chosen_per_token": mean[0::2], "logps/rejected_per_token": mean[1::2]}
    for name, longer in (
        ("chosen", policy.chosen_counts > policy.rejected_counts),
        ("rejected", policy.chosen_counts < policy.rejected_counts),
    ):
        accuracy = f"rewards/accuracies_{name}_longer"
        values[accuracy] = correct * longer
        values[accuracy + DIVISOR] = longer.float()
    return values


def finish(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics to report, from means over whole global batches. A metric over an empty subset is
    left out. Reads divisors on the host."""
    plain = {name: value for name, value in metrics.items() if not name.endswith(DIVISOR)}
    for name, value in metrics.items():
        if name.endswith(DIVISOR):
            metric = name.removesuffix(DIVISOR)
            if float(value) > 0:
                plain[metric] = plain[metric] / value
            else:
                del plain[metric]
    if "rewards/margins" not in plain and {"rewards/chosen", "rewards/rejected"} <= plain.keys():
        # Unpaired examples have no margin each: the difference of two means, as in TRL's KTOTrainer.
        plain["rewards/margins"] = plain["rewards/chosen"] - plain["rewards/rejected"]
    return plain
