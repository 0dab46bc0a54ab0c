"""ORPO, CPO and SimPO: losses of pairs that need no reference.

Legend: ``P`` pairs of a micro-batch. All arithmetic is float32, whatever dtype comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nxdt_align.losses.forms import sigmoid_loss
from nxdt_align.losses.modifiers import check_positive, check_scale, check_smoothing, nll
from nxdt_align.losses.types import LossOutput, Normaliser, ResponseLogps

NLL_TOKENS = ("response", "prompt_and_response")
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


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)), odds(p) = p / (1 - p), from average log-probabilities, (P,).

    Equations 4 and 7 of ORPO (https://arxiv.org/abs/2403.07691). By hand: probabilities 1/2 and 1/4
    have odds 1 and 1/3, so ln 3 = 1.0986.
    """
    chosen, rejected = chosen.float(), rejected.float()
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


@dataclass(frozen=True)
class ORPOLoss:
    """Odds Ratio Preference Optimization (https://arxiv.org/abs/2403.07691, equations 6 to 8).

    A pair's loss is nll_scale times the chosen response's mean negative log-likelihood a token, plus
    beta times -log sigmoid(log odds ratio) of the two responses' mean log-probabilities. The
    likelihood is over the response's tokens, as NeuronX Distributed Training computes it, or over the
    prompt's from the second on as well, as the authors' code and TRL do (TRL: a mean over all tokens of
    a device's batch; here one a pair, which is TRL's with one pair a device).

    Rewards are beta * mean log-probability. Extras carry TRL's names and definitions: ``nll_loss``,
    ``log_odds_ratio`` (log sigmoid of the log odds ratio), ``log_odds_chosen`` (the log odds ratio),
    ``logps/chosen`` and ``logps/rejected`` (means a token, not sums).
    """

    beta: float
    """Weight of the odds-ratio term: the paper's lambda, fairseq2's orpo_lambda."""
    nll_scale: float = 1.0
    """Weight of the likelihood term."""
    nll_tokens: str = "response"
    """One of NLL_TOKENS."""

    needs_reference = False
    paired = True
    needs_tokens = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        check_positive("ORPO's beta", self.beta)
        check_scale("ORPO's nll_scale", self.nll_scale)
        if self.nll_tokens not in NLL_TOKENS:
            choices = ", ".join(NLL_TOKENS)
            raise ValueError(f"ORPO's nll_tokens must be one of {choices}, but is {self.nll_tokens!r}")

    @property
    def needs_prompts(self) -> bool:
        return self.nll_tokens == "prompt_and_response"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        chosen, rejected = policy.mean_logps[0::2], policy.mean_logps[1::2]
        log_odds = log_odds_ratio(chosen, rejected)
        ratio = F.logsigmoid(log_odds)
        likelihood = nll(policy, with_prompt=self.needs_prompts)
        return LossOutput(
            losses=self.nll_scale * likelihood - self.beta * ratio,
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            extras={
                "nll_loss": likelihood.detach(),
                "log_odds_ratio": ratio.detach(),
                "log_odds_chosen": log_odds.detach(),
                "logps/chosen": chosen.detach(),
                "logps/rejected": rejected.detach(),
            },
        )


@dataclass(frozen=True)
class CPOLoss:
    """Contrastive Preference Optimization (https://arxiv.org/abs/2401.08417, equation 3).

    -log sigmoid(beta * (chosen - rejected)) of the responses' log-probabilities, summed over tokens,
    plus nll_scale times the chosen response's negative log-likelihood a token. Rewards are beta * log
    policy; ``nll_loss`` is reported, as TRL does. TRL averages the likelihood over a batch's tokens,
    here it is a mean a response, and then over pairs.
    """

    beta: float = 0.1
    nll_scale: float = 1.0
    """TRL's cpo_alpha."""
    label_smoothing: float = 0.0

    needs_reference = False
    paired = True
    needs_tokens = needs_prompts = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        check_positive("CPO's beta", self.beta)
        check_scale("CPO's nll_scale", self.nll_scale)
        check_smoothing("CPO's label_smoothing", self.label_smoothing)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        chosen, rejected = policy.chosen_logps.float(), policy.rejected_logps.float()
        likelihood = nll(policy)
        return LossOutput(
            losses=sigmoid_loss(chosen - rejected, self.beta, self.label_smoothing)
            + self.nll_scale * likelihood,
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            extras={"nll_loss": likelihood.detach()},
        )


@dataclass(frozen=True)
class SimPOLoss:
    """Simple Preference Optimization (https://arxiv.org/abs/2405.14734, equation 6).

    -log sigmoid(beta * (chosen - rejected) - gamma) of the responses' mean log-probabilities a token,
    plus nll_scale times the chosen response's negative log-likelihood a token (fairseq2's; 0 in the
    paper). Rewards are beta * mean log-probability. As in TRL, ``logps/chosen`` and ``logps/rejected``
    are means a token.
    """

    beta: float = 2.0
    gamma: float = 0.5
    """Target margin between the rewards: TRL's simpo_gamma."""
    nll_scale: float = 0.0
    label_smoothing: float = 0.0

    needs_reference = False
    paired = True
    needs_tokens = needs_prompts = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        check_positive("SimPO's beta", self.beta)
        check_scale("SimPO's gamma", self.gamma)
        check_scale("SimPO's nll_scale", self.nll_scale)
        check_smoothing("SimPO's label_smoothing", self.label_smoothing)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        chosen, rejected = policy.mean_logps[0::2], policy.mean_logps[1::2]
        # The margin first, as TRL has it: beta * (difference - gamma / beta).
        losses = sigmoid_loss(chosen - rejected - self.gamma / self.beta, self.beta, self.label_smoothing)
        return LossOutput(
            losses=losses - self.nll_scale * chosen,
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            extras={
                "nll_loss": -chosen.detach(),
                "logps/chosen": chosen.detach(),
                "logps/rejected": rejected.detach(),
            },
        )
