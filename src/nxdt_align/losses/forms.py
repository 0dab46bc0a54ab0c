"""The forms of a loss of pairs against a reference: ``dpo.loss_type``.

Each is a pure function of a pair's scores, named like the form; ``config/dpo_forms.py`` has a row for each.
The names are TRL's; where TRL and the paper differ, the docstring says which one is followed. All arithmetic
is float32.

Legend: ``P`` pairs; h = beta * (chosen score - rejected score).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nxdt_align.config.alignment import DPOConfig
from nxdt_align.config.dpo_forms import FORMS

_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class PairScores:
    """A form's inputs, (P,) float32 each.

    A score is f'(policy / reference): with DPO's reverse KL, the log-ratio. All are divided by the
    response's tokens where the loss is length-normalised.
    """

    chosen: Tensor
    rejected: Tensor
    policy_margin: Tensor
    """log policy(chosen) - log policy(rejected)."""
    reference_margin: Tensor
    valid: Tensor
    """(P,) bool: False for empty slots, which coupled forms must ignore."""

    @property
    def difference(self) -> Tensor:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class FormSettings:
    """Numbers that forms read: those of the section ``dpo``, and values derived from them."""

    dpo: DPOConfig
    label_smoothing: float
    """The section's, or the form's default if that is null."""
    reward_shift: Tensor | float = 0.0
    """() delta of BCO."""

    @property
    def beta(self) -> float:
        return self.dpo.kl_beta


FormFunction = Callable[[PairScores, FormSettings], Tensor]


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * margin), mixed with its flipped label by ``label_smoothing``.

    Equation 7 of DPO (https://arxiv.org/abs/2305.18290) per pair; with smoothing e, conservative DPO:
    -(1 - e) log sigmoid(h) - e log sigmoid(-h), h = beta * margin
    (https://ericmitchell.ai/cdpo.pdf, equation 3). TRL's ``sigmoid`` leaves label_smoothing out.

    ``margin``, (P,) nats: log(policy / reference) of the chosen response less the rejected one's.
    By hand: margin 0 gives ln 2 = 0.6931; beta 0.1, margin 10 gives ln(1 + e^-1) = 0.3133.
    """
    scaled = beta * margin.float()
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def sigmoid(scores: PairScores, settings: FormSettings) -> Tensor:
    return sigmoid_loss(scores.difference, settings.beta, settings.label_smoothing)


def robust(scores: PairScores, settings: FormSettings) -> Tensor:
    """((1 - e) * -log sigmoid(h) + e * log sigmoid(-h)) / (1 - 2e): unbiased where labels are flipped
    with probability e (https://arxiv.org/abs/2403.00409)."""
    scaled, flipped = settings.beta * scores.difference, settings.label_smoothing
    clean = -(1 - flipped) * F.logsigmoid(scaled)
    return (clean + flipped * F.logsigmoid(-scaled)) / (1 - 2 * flipped)


def ipo(scores: PairScores, settings: FormSettings) -> Tensor:
    """(difference - 1 / (2 beta))^2 (https://arxiv.org/abs/2310.12036, equation 17, beta its tau)."""
    return (scores.difference - 1 / (2 * settings.beta)) ** 2


def hinge(scores: PairScores, settings: FormSettings) -> Tensor:
    """max(0, 1 - gamma * difference): RSO (https://arxiv.org/abs/2309.06657), SLiC-HF."""
    scale = settings.beta if settings.dpo.gamma is None else settings.dpo.gamma
    return torch.relu(1 - scale * scores.difference)


def exo_pair(scores: PairScores, settings: FormSettings) -> Tensor:
    """KL((sigmoid(h), sigmoid(-h)) || (1 - e, e)) (https://arxiv.org/abs/2402.00856, equation 16)."""
    scaled = settings.beta * scores.difference
    # The soft labels (1 - e, e); e = 0 would make log(e) infinite, hence the form's default of 1e-3.
    truth = torch.tensor([1 - settings.label_smoothing, settings.label_smoothing], device=scaled.device).log()
    chosen = torch.sigmoid(scaled) * (F.logsigmoid(scaled) - truth[0])
    return chosen + torch.sigmoid(-scaled) * (F.logsigmoid(-scaled) - truth[1])


def nca_pair(scores: PairScores, settings: FormSettings) -> Tensor:
    """-log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2 of the rewards c and r
    (https://arxiv.org/abs/2402.05369, its two-response case)."""
    chosen, rejected = settings.beta * scores.chosen, settings.beta * scores.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(scores: PairScores, settings: FormSettings) -> Tensor:
    """-log sigmoid(c - delta) - log sigmoid(-(r - delta)) of the rewards c and r, delta their running
    mean (https://arxiv.org/abs/2404.04656). TRL 1.16 has delta 0."""
    delta = settings.reward_shift
    chosen, rejected = settings.beta * scores.chosen, settings.beta * scores.rejected
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(-(rejected - delta))


def sppo_hard(scores: PairScores, settings: FormSettings) -> Tensor:
    """(chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2 (https://arxiv.org/abs/2405.00675, equation
    4.7 with win probabilities 1 and 0)."""
    half = 0.5 / settings.beta
    return (scores.chosen - half) ** 2 + (scores.rejected + half) ** 2


def aot(scores: PairScores, settings: FormSettings) -> Tensor:
    """Alignment via optimal transport, paired (https://arxiv.org/abs/2406.05882): the
    policy's sorted margins against the reference's, rank by rank over the whole global batch."""
    return _by_rank(scores.policy_margin, scores.reference_margin, scores.valid, settings)


def aot_unpaired(scores: PairScores, settings: FormSettings) -> Tensor:
    """As aot, sorted chosen scores against sorted rejected scores."""
    return _by_rank(scores.chosen, scores.rejected, scores.valid, settings)


def _by_rank(upper: Tensor, lower: Tensor, valid: Tensor, settings: FormSettings) -> Tensor:
    """The loss of each difference of equal rank, at the index of the example with this rank in ``upper``."""
    upper, ranking = _sort_valid(upper, valid)
    lower, _ = _sort_valid(lower, valid)
    losses = sigmoid_loss(upper - lower, settings.beta, settings.label_smoothing)
    # argsort of a permutation is its inverse: back to the examples' order.
    return losses[torch.argsort(ranking)]


def _sort_valid(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted values, ascending with empty slots last (as 0, to stay finite), and the sorting indices."""
    # The order is not differentiable; the gradient flows through the gathered values.
    _, order = torch.sort(torch.where(valid, values.detach(), torch.inf), stable=True)
    return torch.where(valid[order], values[order], 0.0), order


def apo_zero(scores: PairScores, settings: FormSettings) -> Tensor:
    """1 - sigmoid(c) + sigmoid(r): raises chosen, lowers rejected (https://arxiv.org/abs/2408.06266,
    equation 7)."""
    return torch.sigmoid(-settings.beta * scores.chosen) + torch.sigmoid(settings.beta * scores.rejected)


def apo_down(scores: PairScores, settings: FormSettings) -> Tensor:
    """sigmoid(c) + 1 - sigmoid(c - r): lowers both, rejected more (equation 8 of the same)."""
    return torch.sigmoid(settings.beta * scores.chosen) + torch.sigmoid(-settings.beta * scores.difference)


def discopop(scores: PairScores, settings: FormSettings) -> Tensor:
    """(1 - m) * -log sigmoid(h) + m * exp(-h), m = sigmoid(h / tau) (https://arxiv.org/abs/2406.08414,
    equation 5)."""
    scaled = settings.beta * scores.difference
    modulation = scaled / settings.dpo.discopop_tau
    # sigmoid(h / tau) * exp(-h) as one exponential: exp(-h) alone overflows for a large negative h.
    exponential = torch.exp(_at_most(_LARGEST_EXPONENT, F.logsigmoid(modulation) - scaled))
    return -F.logsigmoid(scaled) * torch.sigmoid(-modulation) + exponential


def _at_most(largest: float, x: Tensor) -> Tensor:
    """``x.clamp(max=largest)``, whose backward pass XLA computes in float64, which Trainium has not."""
    limit = x.new_full((), largest)
    return torch.where(x > limit, limit, x)


_FUNCTIONS: dict[str, FormFunction] = {name: globals()[form.function or name] for name, form in FORMS.items()}


def form_function(name: str) -> FormFunction:
    """The function of the form ``name``."""
    return _FUNCTIONS[name]


# f-divergences between policy and reference. f-DPO (https://arxiv.org/abs/2309.16240) replaces
# log(policy / reference) in the margin by f'(policy / reference), where f generates the divergence that is
# penalised. The names are TRL's.

_LARGEST_RATIO = 40.0
"""Exponents are clamped here, with gradient 0 beyond: e^40 squared is still finite in float32."""


def divergence_score(log_ratio: Tensor, kind: str, alpha: float = 0.5) -> Tensor:
    """f'(u) for u = exp(``log_ratio``), same shape, float32.

    - reverse_kl: log u (plus a constant that cancels in a margin), DPO's own;
    - forward_kl: 1 - 1/u;
    - js_divergence: log(2u / (1 + u));
    - alpha_divergence: (u^(alpha - 1) - 1) / (alpha - 1), TRL's alpha: 1 less that of the paper. At 1 it
      is reverse_kl, at 0 forward_kl.

    By hand: u = 2 gives 0.6931, 0.5, 0.2877 and, with alpha 0.5, 0.5858. Raises ValueError for an
    unknown ``kind``.
    """
    log_ratio = log_ratio.float()
    if kind == "reverse_kl":
        return log_ratio
    if kind == "forward_kl":
        return 1 - torch.exp(_at_most(_LARGEST_RATIO, -log_ratio))
    if kind == "js_divergence":
        # log(2u / (1 + u)) = ln 2 + log sigmoid(log u).
        return math.log(2.0) + F.logsigmoid(log_ratio)
    if kind == "alpha_divergence":
        if abs(alpha - 1.0) < 1e-6:
            return log_ratio
        # expm1 keeps digits for u near 1, where the power minus 1 cancels.
        return torch.expm1(_at_most(_LARGEST_RATIO, (alpha - 1) * log_ratio)) / (alpha - 1)
    raise ValueError(f"unknown f-divergence {kind!r}")
