"""Supervised fine-tuning: negative log-likelihood of responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nxdt_align.config.alignment import SFTConfig
from nxdt_align.losses.types import LossOutput, Normaliser, ResponseLogps


@dataclass(frozen=True)
class SFTLoss:
    """Negative log-likelihood, a mean over all response tokens of the global batch.

    So a long response weighs more than a short one. By hand: responses of 1 and 3 tokens with sums
    -2 and -3 have loss 5 / 4.
    """

    config: SFTConfig = field(default_factory=SFTConfig)
    """The section of the YAML; it affects the data layout, not the loss."""

    needs_reference = False
    paired = False
    needs_tokens = needs_prompts = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "tokens"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        return LossOutput(losses=-policy.sums.float())
