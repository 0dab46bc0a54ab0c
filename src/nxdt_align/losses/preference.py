"""Preference losses: pure functions of the log-probabilities of chosen and rejected responses.

Legend: ``P`` pairs of a micro-batch. All arithmetic is float32, whatever dtype comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nxdt_align.losses.types import LossOutput, Normaliser, ResponseLogps

LOG_PROBABILITY_MAX = -1e-12
"""``log1mexp`` takes anything above this, 0 (probability 1) and rounding above 0 included, for this:
the value stops at log(1e-12) = -27.6, and the gradient there is 0 instead of infinite."""


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, same shape as ``x``; float32, or float64 where ``x`` is.

    ``log(1 - exp(x))`` as written cancels to log(0) for x near 0. Splitting at -ln 2 between expm1
    and log1p keeps value and gradient, -1 / expm1(-x), to rounding error
    (Maechler 2012, https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf).
    By hand: x = -ln 2 gives ln(1/2) = -0.6931 and gradient -1; x = -1e-8 gives -18.4207 and -1e8.
    """
    x = (x if x.dtype == torch.float64 else x.float()).clamp(max=LOG_PROBABILITY_MAX)
    near_zero = x > -math.log(2.0)
    # Each branch gets an input that is safe for it: where's backward multiplies the branch not taken
    # by 0, and 0 * inf is NaN.
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * margin), mixed with its flipped label by ``label_smoothing``.

    Equation 7 of DPO (https://arxiv.org/abs/2305.18290) a pair; with smoothing e, conservative DPO:
    -(1 - e) log sigmoid(h) - e log sigmoid(-h), h = beta * margin
    (https://ericmitchell.ai/cdpo.pdf, equation 3).

    ``margin``, (P,) nats: log(policy / reference) of the chosen response less the rejected one's.
    By hand: margin 0 gives ln 2 = 0.6931; beta 0.1, margin 10 gives ln(1 + e^-1) = 0.3133.
    """
    scaled = beta * margin.float()
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)), odds(p) = p / (1 - p), from average log-probabilities, (P,).

    Equations 4 and 7 of ORPO (https://arxiv.org/abs/2403.07691). By hand: probabilities 1/2 and 1/4
    have odds 1 and 1/3, so ln 3 = 1.0986.
    """
    chosen, rejected = chosen.float(), rejected.float()
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


@dataclass(frozen=True)
class DPOLoss:
    """Direct Preference Optimization, sigmoid form (https://arxiv.org/abs/2305.18290, equation 7).

    Rewards are beta * log(policy / reference), the paper's implicit reward up to a constant of the
    prompt.
    """

    beta: float
    """Strength of the pull to the reference: YAML's ``kl_beta``."""
    label_smoothing: float = 0.0
    """Probability that a pair's label is flipped, in [0, 0.5)."""

    needs_reference = True
    paired = True
    needs_tokens = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        _check_beta("DPO's kl_beta", self.beta)
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"DPO's label_smoothing must be at least 0 and below 0.5, but is {self.label_smoothing}: "
                "from 0.5 on, the label says nothing or its opposite"
            )

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        if reference is None:
            raise ValueError("DPO needs the reference's log-probabilities, but got none")
        # Policy less reference first: near each other they subtract exactly, so that a policy equal
        # to its reference has a margin of exactly 0.
        chosen = policy.chosen_logps.float() - reference.chosen_logps.float()
        rejected = policy.rejected_logps.float() - reference.rejected_logps.float()
        return LossOutput(
            losses=sigmoid_loss(chosen - rejected, self.beta, self.label_smoothing),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
        )


@dataclass(frozen=True)
class ORPOLoss:
    """Odds Ratio Preference Optimization (https://arxiv.org/abs/2403.07691, equations 6 to 8).

    A pair's loss is the chosen response's mean negative log-likelihood a token, plus beta times
    -log sigmoid(log odds ratio) of the two responses' mean log-probabilities. The likelihood is over
    the response's tokens, as NeuronX Distributed Training computes it.

    Rewards are beta * mean log-probability. Extras carry TRL's names and definitions: ``nll_loss``,
    ``log_odds_ratio`` (log sigmoid of the log odds ratio), ``log_odds_chosen`` (the log odds ratio),
    ``logps/chosen`` and ``logps/rejected`` (means a token, not sums).
    """

    beta: float
    """Weight of the odds-ratio term: the paper's lambda."""

    needs_reference = False
    paired = True
    needs_tokens = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        _check_beta("ORPO's beta", self.beta)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        chosen = policy.chosen_logps.float() / policy.chosen_counts.float()
        rejected = policy.rejected_logps.float() / policy.rejected_counts.float()
        log_odds = log_odds_ratio(chosen, rejected)
        ratio = F.logsigmoid(log_odds)
        return LossOutput(
            losses=-chosen - self.beta * ratio,
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            extras={
                "nll_loss": -chosen.detach(),
                "log_odds_ratio": ratio.detach(),
                "log_odds_chosen": log_odds.detach(),
                "logps/chosen": chosen.detach(),
                "logps/rejected": rejected.detach(),
            },
        )


def _check_beta(name: str, beta: float) -> None:
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"{name} must be a finite number above 0, but is {beta}")
