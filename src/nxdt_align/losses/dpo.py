"""DPO and its variants: losses of pairs against a reference, alone or as a weighted sum."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from nxdt_align.config.alignment import DPOConfig
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.config.fields import require_sound
from nxdt_align.losses.forms import FormSettings, PairScores, divergence_score, form_function
from nxdt_align.losses.modifiers import nll, require_reference, wpo_weights
from nxdt_align.losses.types import LossOutput, Normaliser, ResponseLogps


@dataclass(frozen=True)
class DPOLoss:
    """Direct Preference Optimization (https://arxiv.org/abs/2305.18290) and its variants.

    A pair's loss is the weighted sum of its forms (``loss_type``), each a function of beta *
    log(policy / reference) of the two responses; times WPO's weight if enabled; plus
    nll_scale times the chosen response's negative log-likelihood per token.

    Rewards are beta * log(policy / reference), the paper's implicit reward up to a constant of the
    prompt, whatever the divergence and the normalisation, as TRL reports them.

    Raises ConfigError (a ValueError) with every setting that is out of range or meaningless.
    """

    config: DPOConfig = field(default_factory=DPOConfig)
    """The section of the YAML."""
    state: Tensor | None = field(default=None, repr=False, compare=False)
    """(2,) float32: BCO's mean reward so far and the number of responses in it; None: the mean of the current
    responses."""

    paired = True
    needs_tokens = needs_prompts = needs_logits = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        require_sound(self.config, "dpo")

    # Declared needs

    @property
    def needs_reference(self) -> bool:
        return not self.config.reference_free

    @property
    def needs_collisions(self) -> bool:
        return self.config.use_weighting

    @property
    def couples_examples(self) -> bool:
        return self._shifts or any(FORMS[name].sorts for name in self.config.loss_types)

    @property
    def _shifts(self) -> bool:
        return "bco_pair" in self.config.loss_types and self.config.bco_reward_shift == "running_mean"

    # The loss

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        config, loss_types = self.config, self.config.loss_types
        chosen, rejected = self._log_ratios(policy, reference)
        losses = torch.zeros_like(chosen)
        weights = config.loss_weights or (1.0,) * len(loss_types)
        for name, weight in zip(loss_types, weights, strict=True):
            losses = losses + weight * self._form(name, policy, reference)
        if config.use_weighting:
            losses = losses * wpo_weights(policy)
        extras = {}
        if config.nll_scale:
            likelihood = nll(policy)
            losses = losses + config.nll_scale * likelihood
            extras["nll_loss"] = likelihood.detach()
        scale = config.kl_beta
        # RSO's gamma is the hinge's scale, so its rewards are scaled by it too.
        if config.gamma is not None and loss_types == ("hinge",):
            scale = config.gamma
        return LossOutput(
            losses=losses,
            chosen_rewards=scale * chosen.detach(),
            rejected_rewards=scale * rejected.detach(),
            extras=extras,
        )

    def _log_ratios(self, policy: ResponseLogps, reference: ResponseLogps | None) -> tuple[Tensor, Tensor]:
        chosen, rejected = policy.chosen_logps.float(), policy.rejected_logps.float()
        if self.config.reference_free:
            return chosen, rejected
        reference = require_reference("DPO", policy, reference)
        # Policy minus reference first: nearby floats subtract exactly (Sterbenz), so that a policy equal to
        # its reference has a margin of exactly 0.
        return chosen - reference.chosen_logps.float(), rejected - reference.rejected_logps.float()

    def _form(self, name: str, policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
        config = self.config
        normalise = config.length_normalization
        if normalise is None:
            normalise = FORMS[name].normalised

        def scaled(values: Tensor) -> Tensor:
            """(N,) or its chosen or rejected half, divided by the tokens."""
            if not normalise:
                return values
            return values / policy.lengths

        def margin(sums: Tensor) -> Tensor:
            values = scaled(sums.float())
            return values[0::2] - values[1::2]

        ratios = torch.stack(self._log_ratios(policy, reference), 1).flatten()
        scores = scaled(divergence_score(ratios, config.f_divergence_type, config.f_alpha_divergence_coef))
        return form_function(name)(
            PairScores(
                chosen=scores[0::2],
                rejected=scores[1::2],
                policy_margin=margin(policy.sums),
                # Only forms that need a reference read this, so zeros stand for a missing one.
                reference_margin=margin(policy.sums.detach() * 0 if reference is None else reference.sums),
                valid=policy.valid[0::2] & policy.valid[1::2],
            ),
            self._settings(name, scores, policy.valid),
        )

    def _settings(self, name: str, scores: Tensor, valid: Tensor) -> FormSettings:
        smoothing = self.config.label_smoothing
        if smoothing is None:
            smoothing = FORMS[name].smoothing
        shift: Tensor | float = 0.0
        if name == "bco_pair" and self._shifts:
            shift = _mean(self.config.kl_beta * scores, valid)
            if self.state is not None:
                shift = torch.where(self.state[1] > 0, self.state[0], shift)
        return FormSettings(self.config, smoothing, shift)

    # BCO's running mean, kept across steps

    def initial_state(self) -> Tensor | None:
        """(2,) float32, the mean reward so far and its number of responses; None if the loss has no state."""
        return torch.zeros(2) if self._shifts else None

    def next_state(self, state: Tensor, policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
        """``state`` updated with a global batch's responses."""
        chosen, rejected = self._log_ratios(policy, reference)
        rewards = self.config.kl_beta * torch.stack((chosen, rejected), 1).flatten().detach()
        if self.config.length_normalization:
            rewards = rewards / policy.lengths
        seen = policy.valid.sum().to(state.dtype)
        count = state[1] + seen
        # The incremental mean (Welford) in float32; a running sum would lose digits over a long run.
        mean = state[0] + (_mean(rewards, policy.valid) - state[0]) * seen / count.clamp(min=1.0)
        return torch.stack((mean, count))

    def with_state(self, state: Tensor) -> DPOLoss:
        """This loss with the running mean of ``state``."""
        return replace(self, state=state)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    total = torch.where(valid, values.detach(), 0.0).sum()
    return total / valid.sum().clamp(min=1)
