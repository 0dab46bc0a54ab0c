"""CPO and SimPO: contrastive losses of pairs without a reference. All arithmetic is float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nxdt_align.config.alignment import CPOConfig, SimPOConfig
from nxdt_align.config.fields import require_sound
from nxdt_align.losses.forms import sigmoid_loss
from nxdt_align.losses.modifiers import nll
from nxdt_align.losses.types import LossOutput, Normaliser, ResponseLogps


@dataclass(frozen=True)
class CPOLoss:
    """Contrastive Preference Optimization (https://arxiv.org/abs/2401.08417, equation 3).

    -log sigmoid(beta * (chosen - rejected)) of the responses' log-probabilities, summed over tokens,
    plus nll_scale times the chosen response's negative log-likelihood per token. Rewards are beta * log
    policy; ``nll_loss`` is reported, as TRL does. TRL averages the likelihood over a batch's tokens;
    here it is averaged per response, then over pairs.
    """

    config: CPOConfig = field(default_factory=CPOConfig)
    """The section of the YAML."""

    needs_reference = False
    paired = True
    needs_tokens = needs_prompts = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        require_sound(self.config, "cpo")

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        config = self.config
        chosen, rejected = policy.chosen_logps.float(), policy.rejected_logps.float()
        likelihood = nll(policy)
        return LossOutput(
            losses=sigmoid_loss(chosen - rejected, config.beta, config.label_smoothing)
            + config.nll_scale * likelihood,
            chosen_rewards=config.beta * chosen.detach(),
            rejected_rewards=config.beta * rejected.detach(),
            extras={"nll_loss": likelihood.detach()},
        )


@dataclass(frozen=True)
class SimPOLoss:
    """Simple Preference Optimization (https://arxiv.org/abs/2405.14734, equation 6).

    -log sigmoid(beta * (chosen - rejected) - gamma) of the responses' mean log-probabilities per token,
    plus nll_scale times the chosen response's negative log-likelihood per token (fairseq2's; 0 in the
    paper). Rewards are beta * mean log-probability. As in TRL, ``logps/chosen`` and ``logps/rejected``
    are means per token.
    """

    config: SimPOConfig = field(default_factory=SimPOConfig)
    """The section of the YAML."""

    needs_reference = False
    paired = True
    needs_tokens = needs_prompts = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        require_sound(self.config, "simpo")

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        config = self.config
        chosen, rejected = policy.mean_logps[0::2], policy.mean_logps[1::2]
        # The margin inside, as in TRL, so that label smoothing flips it too: beta * (difference - gamma /
        # beta).
        losses = sigmoid_loss(
            chosen - rejected - config.gamma / config.beta, config.beta, config.label_smoothing
        )
        return LossOutput(
            losses=losses - config.nll_scale * chosen,
            chosen_rewards=config.beta * chosen.detach(),
            rejected_rewards=config.beta * rejected.detach(),
            extras={
                "nll_loss": -chosen.detach(),
                "logps/chosen": chosen.detach(),
                "logps/rejected": rejected.detach(),
            },
        )
