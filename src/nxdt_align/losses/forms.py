"""The forms of a loss of pairs against a reference: ``dpo.loss_type``.

Each is a pure function of a pair's scores. TRL's names; where TRL and the paper differ, the docstring
says which is taken. All arithmetic is float32.

Legend: ``P`` pairs; h = beta * (chosen score - rejected score).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EXO_LABEL_SMOOTHING = 1e-3
"""Epsilon that the EXO paper recommends."""
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class PairScores:
    """What a form is a function of, (P,) float32 each.

    A score is f'(policy / reference): with DPO's reverse KL, the log-ratio. All are divided by the
    response's tokens where the loss is length-normalised.
    """

    chosen: Tensor
    rejected: Tensor
    policy_margin: Tensor
    """log policy(chosen) - log policy(rejected)."""
    reference_margin: Tensor
    valid: Tensor
    """(P,) bool: False at empty places, which must not count where examples are coupled."""

    @property
    def difference(self) -> Tensor:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class FormSettings:
    """The numbers that forms take."""

    beta: float
    label_smoothing: float = 0.0
    gamma: float | None = None
    """Scale of hinge's margin in the place of beta."""
    discopop_tau: float = 0.05
    reward_shift: Tensor | float = 0.0
    """() delta of BCO."""


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * margin), mixed with its flipped label by ``label_smoothing``.

    Equation 7 of DPO (https://arxiv.org/abs/2305.18290) a pair; with smoothing e, conservative DPO:
    -(1 - e) log sigmoid(h) - e log sigmoid(-h), h = beta * margin
    (https://ericmitchell.ai/cdpo.pdf, equation 3). TRL's ``sigmoid`` leaves label_smoothing out.

    ``margin``, (P,) nats: log(policy / reference) of the chosen response less the rejected one's.
    By hand: margin 0 gives ln 2 = 0.6931; beta 0.1, margin 10 gives ln(1 + e^-1) = 0.3133.
    """
    scaled = beta * margin.float()
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def _sigmoid(scores: PairScores, settings: FormSettings) -> Tensor:
    return sigmoid_loss(scores.difference, settings.beta, settings.label_smoothing)


def _robust(scores: PairScores, settings: FormSettings) -> Tensor:
    """((1 - e) * -log sigmoid(h) + e * log sigmoid(-h)) / (1 - 2e): unbiased where labels are flipped
    with probability e (https://arxiv.org/abs/2403.00409)."""
    scaled, flipped = settings.beta * scores.difference, settings.label_smoothing
    clean = -(1 - flipped) * F.logsigmoid(scaled)
    return (clean + flipped * F.logsigmoid(-scaled)) / (1 - 2 * flipped)


def _ipo(scores: PairScores, settings: FormSettings) -> Tensor:
    """(difference - 1 / (2 beta))^2 (https://arxiv.org/abs/2310.12036, equation 17, beta its tau)."""
    return (scores.difference - 1 / (2 * settings.beta)) ** 2


def _hinge(scores: PairScores, settings: FormSettings) -> Tensor:
    """max(0, 1 - gamma * difference): RSO (https://arxiv.org/abs/2309.06657), SLiC-HF."""
    scale = settings.beta if settings.gamma is None else settings.gamma
    return torch.relu(1 - scale * scores.difference)


def _exo_pair(scores: PairScores, settings: FormSettings) -> Tensor:
    """KL((sigmoid(h), sigmoid(-h)) || (1 - e, e)) (https://arxiv.org/abs/2402.00856, equation 16)."""
    scaled = settings.beta * scores.difference
    truth = torch.tensor([1 - settings.label_smoothing, settings.label_smoothing], device=scaled.device).log()
    chosen = torch.sigmoid(scaled) * (F.logsigmoid(scaled) - truth[0])
    return chosen + torch.sigmoid(-scaled) * (F.logsigmoid(-scaled) - truth[1])


def _nca_pair(scores: PairScores, settings: FormSettings) -> Tensor:
    """-log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2 of the rewards c and r
    (https://arxiv.org/abs/2402.05369, its two-response case)."""
    chosen, rejected = settings.beta * scores.chosen, settings.beta * scores.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(scores: PairScores, settings: FormSettings) -> Tensor:
    """-log sigmoid(c - delta) - log sigmoid(-(r - delta)) of the rewards c and r, delta their running
    mean (https://arxiv.org/abs/2404.04656). TRL 1.16 has delta 0."""
    delta = settings.reward_shift
    chosen, rejected = settings.beta * scores.chosen, settings.beta * scores.rejected
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(-(rejected - delta))


def _sppo_hard(scores: PairScores, settings: FormSettings) -> Tensor:
    """(chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2 (https://arxiv.org/abs/2405.00675, equation
    4.7 with win probabilities 1 and 0)."""
    half = 0.5 / settings.beta
    return (scores.chosen - half) ** 2 + (scores.rejected + half) ** 2


def _aot(scores: PairScores, settings: FormSettings) -> Tensor:
    """Alignment via optimal transport, paired (https://arxiv.org/abs/2406.05882): the
    policy's sorted margins against the reference's, rank by rank over the whole global batch."""
    return _by_rank(scores.policy_margin, scores.reference_margin, scores.valid, settings)


def _aot_unpaired(scores: PairScores, settings: FormSettings) -> Tensor:
    """As aot, sorted chosen scores against sorted rejected scores."""
    return _by_rank(scores.chosen, scores.rejected, scores.valid, settings)


def _by_rank(upper: Tensor, lower: Tensor, valid: Tensor, settings: FormSettings) -> Tensor:
    """Loss of each rank's difference, at the place of the example that has this rank in ``upper``."""
    upper, ranking = _sort_valid(upper, valid)
    lower, _ = _sort_valid(lower, valid)
    losses = sigmoid_loss(upper - lower, settings.beta, settings.label_smoothing)
    return losses[torch.argsort(ranking)]


def _sort_valid(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending, empty places last (as 0, so that they stay finite), and which place each came from."""
    _, order = torch.sort(torch.where(valid, values.detach(), torch.inf), stable=True)
    return torch.where(valid[order], values[order], 0.0), order


def _apo_zero(scores: PairScores, settings: FormSettings) -> Tensor:
    """1 - sigmoid(c) + sigmoid(r): raises chosen, lowers rejected (https://arxiv.org/abs/2408.06266,
    equation 7)."""
    return torch.sigmoid(-settings.beta * scores.chosen) + torch.sigmoid(settings.beta * scores.rejected)


def _apo_down(scores: PairScores, settings: FormSettings) -> Tensor:
    """sigmoid(c) + 1 - sigmoid(c - r): lowers both, rejected more (equation 8 of the same)."""
    return torch.sigmoid(settings.beta * scores.chosen) + torch.sigmoid(-settings.beta * scores.difference)


def _discopop(scores: PairScores, settings: FormSettings) -> Tensor:
    """(1 - m) * -log sigmoid(h) + m * exp(-h), m = sigmoid(h / tau) (https://arxiv.org/abs/2406.08414,
    equation 5). The second term is computed as one exponential: exp(-h) alone overflows."""
    scaled = settings.beta * scores.difference
    modulation = scaled / settings.discopop_tau
    exponential = torch.exp((F.logsigmoid(modulation) - scaled).clamp(max=_LARGEST_EXPONENT))
    return -F.logsigmoid(scaled) * torch.sigmoid(-modulation) + exponential


@dataclass(frozen=True)
class Form:
    """A form and what may be combined with it."""

    loss: Callable[[PairScores, FormSettings], Tensor]
    of_difference: bool = True
    """Whether it depends on the scores' difference alone: then another f-divergence, and doing without
    a reference, make sense."""
    takes_smoothing: bool = False
    normalised: bool = False
    """Whether scores are divided by the response's tokens unless told otherwise."""
    sorts: bool = False
    """Whether it depends on the ranks of a pair's scores among all others'."""


FORMS: dict[str, Form] = {
    "sigmoid": Form(_sigmoid, takes_smoothing=True),
    "robust": Form(_robust, takes_smoothing=True),
    "ipo": Form(_ipo, normalised=True),
    "hinge": Form(_hinge),
    "exo_pair": Form(_exo_pair, takes_smoothing=True),
    "nca_pair": Form(_nca_pair, of_difference=False),
    "bco_pair": Form(_bco_pair, of_difference=False),
    "sppo_hard": Form(_sppo_hard, of_difference=False),
    "aot": Form(_aot, of_difference=False, takes_smoothing=True, sorts=True),
    "aot_unpaired": Form(_aot_unpaired, of_difference=False, takes_smoothing=True, sorts=True),
    "apo_zero": Form(_apo_zero, of_difference=False),
    "apo_down": Form(_apo_down, of_difference=False),
    "discopop": Form(_discopop),
    "sigmoid_norm": Form(_sigmoid, takes_smoothing=True, normalised=True),
}
"""``dpo.loss_type`` -> form."""
