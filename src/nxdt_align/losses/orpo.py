"""ORPO: a loss of pairs without a reference.

Legend: ``P`` pairs of a micro-batch. All arithmetic is float32, whatever dtype comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nxdt_align.config.alignment import ORPOConfig
from nxdt_align.config.fields import require_sound
from nxdt_align.losses.modifiers import nll
from nxdt_align.losses.types import LossOutput, Normaliser, ResponseLogps

LOG_PROBABILITY_MAX = -1e-12
"""``log1mexp`` clamps its input here, also 0 (probability 1) and rounding above 0: the value stops at
log(1e-12) = -27.6, and the gradient beyond is 0 instead of infinite."""


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, same shape as ``x``; float32, or float64 where ``x`` is.

    The naive ``log(1 - exp(x))`` cancels to log(0) for x near 0. Switching between expm1 and log1p at -ln 2
    keeps the value and the gradient, -1 / expm1(-x), accurate to rounding
    (Maechler 2012, https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf).
    By hand: x = -ln 2 gives ln(1/2) = -0.6931 and gradient -1; x = -1e-8 gives -18.4207 and -1e8.
    """
    x = x if x.dtype == torch.float64 else x.float()
    # Tensors: XLA compares with, and clamps at, a Python number in float64, which Trainium has not.
    largest, edge, safe = (x.new_full((), value) for value in (LOG_PROBABILITY_MAX, -math.log(2.0), -1.0))
    x = torch.where(x > largest, largest, x)
    near_zero = x > edge
    # Each branch gets a safe input: torch.where's backward multiplies the gradient of the branch not taken by
    # 0, and 0 * inf is NaN.
    near = torch.log(-torch.expm1(torch.where(near_zero, x, safe)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, safe, x)))
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

    A pair's loss is nll_scale times the chosen response's mean negative log-likelihood per token, plus
    beta times -log sigmoid(log odds ratio) of the two responses' mean log-probabilities. The
    likelihood is over the response's tokens, as NeuronX Distributed Training computes it, or over the
    prompt's from the second on as well, as the authors' code and TRL do (TRL: a mean over all tokens of
    a device's batch; here one per pair, which is TRL's with one pair per device).

    Rewards are beta * mean log-probability. Extras carry TRL's names and definitions: ``nll_loss``,
    ``log_odds_ratio`` (log sigmoid of the log odds ratio), ``log_odds_chosen`` (the log odds ratio),
    ``logps/chosen`` and ``logps/rejected`` (means per token, not sums).
    """

    config: ORPOConfig = field(default_factory=ORPOConfig)
    """The section of the YAML."""

    needs_reference = False
    paired = True
    needs_tokens = needs_collisions = needs_logits = couples_examples = False
    normaliser: ClassVar[Normaliser] = "pairs"

    def __post_init__(self) -> None:
        require_sound(self.config, "orpo")

    @property
    def needs_prompts(self) -> bool:
        return self.config.nll_tokens == "prompt_and_response"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        config = self.config
        chosen, rejected = policy.mean_logps[0::2], policy.mean_logps[1::2]
        log_odds = log_odds_ratio(chosen, rejected)
        ratio = F.logsigmoid(log_odds)
        likelihood = nll(policy, with_prompt=self.needs_prompts)
        return LossOutput(
            losses=config.nll_scale * likelihood - config.beta * ratio,
            chosen_rewards=config.beta * chosen.detach(),
            rejected_rewards=config.beta * rejected.detach(),
            extras={
                "nll_loss": likelihood.detach(),
                "log_odds_ratio": ratio.detach(),
                "log_odds_chosen": log_odds.detach(),
                "logps/chosen": chosen.detach(),
                "logps/rejected": rejected.detach(),
            },
        )
