"""Losses by name. A new objective is a line in ``OBJECTIVES``; a new form of DPO, in ``forms.FORMS``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nxdt_align.losses.preference import DPOLoss
from nxdt_align.losses.reference_free import CPOLoss, ORPOLoss, SimPOLoss
from nxdt_align.losses.supervised import SFTLoss
from nxdt_align.losses.types import Loss
from nxdt_align.losses.unpaired import KTOLoss


def _build_dpo(
    *,
    kl_beta: float,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float | None = None,
    gamma: float | None = None,
    discopop_tau: float = 0.05,
    bco_reward_shift: str = "running_mean",
    reference_free: bool = False,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    length_normalization: bool | None = None,
    use_weighting: bool = False,
    nll_scale: float = 0.0,
) -> Loss:
    return DPOLoss(
        beta=kl_beta,
        label_smoothing=label_smoothing,
        loss_types=(loss_type,) if isinstance(loss_type, str) else tuple(loss_type),
        loss_weights=None if loss_weights is None else tuple(loss_weights),
        gamma=gamma,
        discopop_tau=discopop_tau,
        bco_reward_shift=bco_reward_shift,
        reference_free=reference_free,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        length_normalization=length_normalization,
        use_weighting=use_weighting,
        nll_scale=nll_scale,
    )


def _build_orpo(*, beta: float, nll_scale: float = 1.0, nll_tokens: str = "response") -> Loss:
    return ORPOLoss(beta, nll_scale, nll_tokens)


def _build_cpo(*, beta: float = 0.1, nll_scale: float = 1.0, label_smoothing: float = 0.0) -> Loss:
    return CPOLoss(beta, nll_scale, label_smoothing)


def _build_simpo(
    *, beta: float = 2.0, gamma: float = 0.5, nll_scale: float = 0.0, label_smoothing: float = 0.0
) -> Loss:
    return SimPOLoss(beta, gamma, nll_scale, label_smoothing)


def _build_kto(*, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
    return KTOLoss(beta, desirable_weight, undesirable_weight)


def _build_sft() -> Loss:
    return SFTLoss()


OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "dpo": _build_dpo,
    "orpo": _build_orpo,
    "cpo": _build_cpo,
    "simpo": _build_simpo,
    "kto": _build_kto,
    "sft": _build_sft,
}
"""Objective -> builder, whose keywords are the settings that it takes."""


def loss_settings(objective: str) -> list[str]:
    """Names of the settings that the loss of ``objective`` takes. Raises ValueError for an unknown one."""
    return list(inspect.signature(_builder(objective)).parameters)


def build_loss(objective: str, settings: Mapping[str, Any]) -> Loss:
    """The loss of ``objective`` with the YAML's own setting names.

    Raises ValueError for an unknown objective, loss type or setting, a missing setting, or a value out
    of range. A setting that is None counts as left out.
    """
    builder = _builder(objective)
    taken = inspect.signature(builder).parameters
    unknown = sorted(set(settings) - set(taken))
    if unknown:
        raise ValueError(f"{objective} takes no {', '.join(unknown)}; its settings are {_listed(taken)}")
    missing = [n for n, p in taken.items() if p.default is p.empty and settings.get(n) is None]
    if missing:
        raise ValueError(f"{objective} needs {', '.join(missing)}: set model_alignment_strategy.{objective}")
    return builder(**{name: value for name, value in settings.items() if value is not None})


def _builder(objective: str) -> Callable[..., Loss]:
    builder = OBJECTIVES.get(objective)
    if builder is None:
        raise ValueError(f"the objective must be one of {_listed(OBJECTIVES)}, but is {objective!r}")
    return builder


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"
