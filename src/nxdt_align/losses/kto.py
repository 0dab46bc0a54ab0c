"""KTO: a loss of single responses that are labelled good or bad.

Legend: ``P`` examples. Slot ``2k`` is example k's completion, slot ``2k + 1`` a mismatched completion
(another prompt's) after the same prompt, which estimates the KL divergence from the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from nxdt_align.config.alignment import KTOConfig
from nxdt_align.config.fields import require_sound
from nxdt_align.losses.metrics import DIVISOR
from nxdt_align.losses.modifiers import require_reference
from nxdt_align.losses.types import LossOutput, Normaliser, ResponseLogps


@dataclass(frozen=True)
class KTOLoss:
    """Kahneman-Tversky Optimization (https://arxiv.org/abs/2402.01306, equation 7).

    For a desirable completion weight * (1 - sigmoid(beta * (ratio - kl))), for an undesirable one weight *
    (1 - sigmoid(beta * (kl - ratio))); ratio is log(policy / reference), kl the mean of the mismatched
    completions' ratios over the global batch, at least 0 and without gradient. TRL takes kl over each
    device's micro-batch and averages those.

    By hand: ratio 2, kl 1, beta 1: 1 - sigmoid(1) = 0.2689 if desirable, 1 - sigmoid(-1) = 0.7311 if not.
    """

    config: KTOConfig = field(default_factory=KTOConfig)
    """The section of the YAML."""

    needs_reference = True
    paired = True
    couples_examples = True
    needs_tokens = needs_prompts = needs_collisions = needs_logits = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        require_sound(self.config, "kto")

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        reference = require_reference("KTO", policy, reference)
        config = self.config
        ratio = policy.completion_logps.float() - reference.completion_logps.float()
        kl = self._kl(policy, reference)
        desirable = policy.labels
        signed = torch.where(desirable, ratio - kl, kl - ratio)
        weight = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
        return LossOutput(
            # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits for large x.
            losses=weight * torch.sigmoid(-config.beta * signed),
            extras=_metrics(policy, config.beta * ratio.detach(), desirable, kl),
        )

    def _kl(self, policy: ResponseLogps, reference: ResponseLogps) -> Tensor:
        """() float32, nats."""
        # Detached, as in the paper: z_0 is only a baseline, and no gradient flows through it.
        mismatched = (policy.mismatched_logps.float() - reference.mismatched_logps.float()).detach()
        valid = policy.valid[0::2] & policy.valid[1::2]
        mean = torch.where(valid, mismatched, 0.0).sum() / valid.sum().clamp(min=1)
        # A KL divergence is never negative, but its estimate from mismatched pairs can be.
        return mean.clamp(min=0)


def _metrics(policy: ResponseLogps, rewards: Tensor, desirable: Tensor, kl: Tensor) -> dict[str, Tensor]:
    """TRL's: means over the desirable completions, and over the others."""
    values = {"kl": kl.expand(rewards.shape)}
    logps = policy.completion_logps.detach()
    for name, those in (("chosen", desirable), ("rejected", ~desirable)):
        for metric, value in (("rewards", rewards), ("logps", logps)):
            values[f"{metric}/{name}"] = value * those
            # finish() divides the two means, which leaves the mean over this label's completions.
            values[f"{metric}/{name}{DIVISOR}"] = those.float()
    return values
