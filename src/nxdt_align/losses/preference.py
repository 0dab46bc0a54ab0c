"""DPO and its family: losses of pairs against a reference, alone or as a weighted sum of several."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from nxdt_align.losses.divergence import F_DIVERGENCES, divergence_score
from nxdt_align.losses.forms import EXO_LABEL_SMOOTHING, FORMS, FormSettings, PairScores
from nxdt_align.losses.modifiers import check_positive, check_scale, check_smoothing, nll, wpo_weights
from nxdt_align.losses.types import LossOutput, Normaliser, ResponseLogps

REWARD_SHIFTS = ("running_mean", "none")


@dataclass(frozen=True)
class DPOLoss:
    """Direct Preference Optimization (https://arxiv.org/abs/2305.18290) and what grew from it.

    A pair's loss is the weighted sum of its forms (``forms.FORMS``), each a function of beta *
    log(policy / reference) of the two responses; times WPO's weight where that is asked; plus
    nll_scale times the chosen response's negative log-likelihood a token.

    Rewards are beta * log(policy / reference), the paper's implicit reward up to a constant of the
    prompt, whatever the divergence and the normalisation, as TRL reports them.

    Raises ValueError for numbers out of range and for combinations that mean nothing.
    """

    beta: float
    """Strength of the pull to the reference: YAML's ``kl_beta``."""
    label_smoothing: float | None = None
    """Probability that a pair's label is flipped, in [0, 0.5); None: 0, and 0.001 for exo_pair."""
    loss_types: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    """One a form; None: 1 each."""
    gamma: float | None = None
    """hinge's scale in the place of beta."""
    discopop_tau: float = 0.05
    bco_reward_shift: str = "running_mean"
    """bco_pair's delta: the mean reward of all responses so far, or none (0), as TRL 1.16 has it."""
    reference_free: bool = False
    """Take the reference for uniform: its log-probabilities are left out."""
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    length_normalization: bool | None = None
    """Divide scores by the response's tokens; None: as the form does."""
    use_weighting: bool = False
    """WPO's weights."""
    nll_scale: float = 0.0
    state: Tensor | None = field(default=None, repr=False, compare=False)
    """(2,) float32: BCO's mean reward so far and of how many responses; without any, it is the mean of
    the responses at hand."""

    paired = True
    needs_tokens = needs_prompts = needs_logits = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        check_positive("DPO's kl_beta", self.beta)
        if self.label_smoothing is not None:
            check_smoothing("DPO's label_smoothing", self.label_smoothing)
        if self.gamma is not None:
            check_positive("DPO's gamma", self.gamma)
        check_positive("DPO's discopop_tau", self.discopop_tau)
        check_scale("DPO's nll_scale", self.nll_scale)
        _check_choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        _check_choice("bco_reward_shift", self.bco_reward_shift, REWARD_SHIFTS)
        self._check_forms()

    def _check_forms(self) -> None:
        if not self.loss_types:
            raise ValueError("DPO's loss_type must name at least one form")
        for name in self.loss_types:
            _check_choice("loss_type", name, tuple(FORMS))
            if not FORMS[name].of_difference and self.reference_free:
                raise ValueError(f"DPO's reference_free: loss_type {name} needs a reference")
            if not FORMS[name].of_difference and self.f_divergence_type != "reverse_kl":
                raise ValueError(f"DPO's f_divergence_type must be reverse_kl with loss_type {name}")
            if FORMS[name].sorts and self.use_weighting:
                raise ValueError(
                    f"DPO's use_weighting: loss_type {name} sorts, so a pair has no loss of its own"
                )
        if self.reference_free and self.f_divergence_type != "reverse_kl":
            raise ValueError("DPO's reference_free: another f-divergence than reverse_kl needs a reference")
        if "exo_pair" in self.loss_types and self.label_smoothing == 0:
            raise ValueError("DPO's label_smoothing must be above 0 with loss_type exo_pair, but is 0")
        if self.loss_weights is not None:
            _check_weights(self.loss_weights, self.loss_types)

    # What it declares

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    @property
    def needs_collisions(self) -> bool:
        return self.use_weighting

    @property
    def couples_examples(self) -> bool:
        return self._shifts or any(FORMS[name].sorts for name in self.loss_types)

    @property
    def _shifts(self) -> bool:
        return "bco_pair" in self.loss_types and self.bco_reward_shift == "running_mean"

    # The loss

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        chosen, rejected = self._log_ratios(policy, reference)
        losses = torch.zeros_like(chosen)
        weights = self.loss_weights or (1.0,) * len(self.loss_types)
        for name, weight in zip(self.loss_types, weights, strict=True):
            losses = losses + weight * self._form(name, policy, reference)
        if self.use_weighting:
            losses = losses * wpo_weights(policy)
        extras = {}
        if self.nll_scale:
            likelihood = nll(policy)
            losses = losses + self.nll_scale * likelihood
            extras["nll_loss"] = likelihood.detach()
        scale = self.gamma if self.gamma is not None and self.loss_types == ("hinge",) else self.beta
        return LossOutput(
            losses=losses,
            chosen_rewards=scale * chosen.detach(),
            rejected_rewards=scale * rejected.detach(),
            extras=extras,
        )

    def _log_ratios(self, policy: ResponseLogps, reference: ResponseLogps | None) -> tuple[Tensor, Tensor]:
        chosen, rejected = policy.chosen_logps.float(), policy.rejected_logps.float()
        if self.reference_free:
            return chosen, rejected
        if reference is None:
            raise ValueError("DPO needs the reference's log-probabilities, but got none")
        # Policy less reference first: near each other they subtract exactly, so that a policy equal
        # to its reference has a margin of exactly 0.
        return chosen - reference.chosen_logps.float(), rejected - reference.rejected_logps.float()

    def _form(self, name: str, policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
        form = FORMS[name]
        normalise = form.normalised if self.length_normalization is None else self.length_normalization

        def scaled(values: Tensor) -> Tensor:
            """(N,) or its chosen or rejected half, divided by the tokens."""
            if not normalise:
                return values
            return values / policy.counts.float()

        def margin(sums: Tensor) -> Tensor:
            values = scaled(sums.float())
            return values[0::2] - values[1::2]

        ratios = torch.stack(self._log_ratios(policy, reference), 1).flatten()
        scores = scaled(divergence_score(ratios, self.f_divergence_type, self.f_alpha_divergence_coef))
        return form.loss(
            PairScores(
                chosen=scores[0::2],
                rejected=scores[1::2],
                policy_margin=margin(policy.sums),
                reference_margin=margin(policy.sums.detach() * 0 if reference is None else reference.sums),
                valid=policy.valid[0::2] & policy.valid[1::2],
            ),
            self._settings(name, scores, policy.valid),
        )

    def _settings(self, name: str, scores: Tensor, valid: Tensor) -> FormSettings:
        smoothing = self.label_smoothing
        if smoothing is None:
            smoothing = EXO_LABEL_SMOOTHING if name == "exo_pair" else 0.0
        shift: Tensor | float = 0.0
        if name == "bco_pair" and self._shifts:
            shift = _mean(self.beta * scores, valid)
            if self.state is not None:
                shift = torch.where(self.state[1] > 0, self.state[0], shift)
        return FormSettings(
            beta=self.beta,
            label_smoothing=smoothing,
            gamma=self.gamma,
            discopop_tau=self.discopop_tau,
            reward_shift=shift,
        )

    # BCO's running mean, which outlives a step

    def initial_state(self) -> Tensor | None:
        """(2,) float32, the mean reward so far and the responses that it is a mean of; None where the
        loss remembers nothing."""
        return torch.zeros(2) if self._shifts else None

    def next_state(self, state: Tensor, policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
        """``state`` with a global batch's responses counted in."""
        chosen, rejected = self._log_ratios(policy, reference)
        rewards = self.beta * torch.stack((chosen, rejected), 1).flatten().detach()
        if self.length_normalization:
            rewards = rewards / policy.counts.float()
        seen = policy.valid.sum().to(state.dtype)
        count = state[1] + seen
        mean = state[0] + (_mean(rewards, policy.valid) - state[0]) * seen / count.clamp(min=1.0)
        return torch.stack((mean, count))

    def with_state(self, state: Tensor) -> DPOLoss:
        """This loss with the running mean of ``state``."""
        return replace(self, state=state)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    total = torch.where(valid, values.detach(), 0.0).sum()
    return total / valid.sum().clamp(min=1)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"DPO's {key} must be one of {', '.join(choices)}, but is {value!r}")


def _check_weights(weights: tuple[float, ...], forms: tuple[str, ...]) -> None:
    if len(weights) != len(forms):
        raise ValueError(
            f"DPO's loss_weights must have one weight for each loss_type ({len(forms)}: {', '.join(forms)}), "
            f"but has {len(weights)}"
        )
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ValueError(f"DPO's loss_weights must be at least 0 and not all 0, but are {list(weights)}")
