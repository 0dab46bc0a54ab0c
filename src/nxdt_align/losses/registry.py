"""Losses by name. A new objective is a line in ``OBJECTIVES``; a new form of DPO, in ``DPO_FORMS``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nxdt_align.losses.preference import DPOLoss, ORPOLoss
from nxdt_align.losses.supervised import SFTLoss
from nxdt_align.losses.types import Loss


def _build_dpo(*, kl_beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> Loss:
    build = DPO_FORMS.get(loss_type)
    if build is None:
        raise ValueError(
            f"model_alignment_strategy.dpo.loss_type must be one of {_listed(DPO_FORMS)}, "
            f"but is {loss_type!r}"
        )
    return build(kl_beta, label_smoothing)


def _build_orpo(*, beta: float) -> Loss:
    return ORPOLoss(beta)


def _build_sft() -> Loss:
    return SFTLoss()


DPO_FORMS: dict[str, Callable[[float, float], Loss]] = {
    "sigmoid": DPOLoss,
}
"""``loss_type`` -> builder from (beta, label smoothing)."""

OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "dpo": _build_dpo,
    "orpo": _build_orpo,
    "sft": _build_sft,
}
"""Objective -> builder, whose keywords are the settings that it takes."""


def build_loss(objective: str, settings: Mapping[str, Any]) -> Loss:
    """The loss of ``objective`` ("dpo", "orpo" or "sft") with the YAML's own setting names.

    dpo takes ``kl_beta`` (required), ``loss_type`` and ``label_smoothing``; orpo takes ``beta``
    (required); sft takes none. Raises ValueError for an unknown objective, loss type or setting, a
    missing setting, or a value out of range. A setting that is None counts as left out.
    """
    builder = OBJECTIVES.get(objective)
    if builder is None:
        raise ValueError(f"the objective must be one of {_listed(OBJECTIVES)}, but is {objective!r}")
    taken = inspect.signature(builder).parameters
    unknown = sorted(set(settings) - set(taken))
    if unknown:
        raise ValueError(f"{objective} takes no {', '.join(unknown)}; its settings are {_listed(taken)}")
    missing = [n for n, p in taken.items() if p.default is p.empty and settings.get(n) is None]
    if missing:
        raise ValueError(f"{objective} needs {', '.join(missing)}: set model_alignment_strategy.{objective}")
    return builder(**{name: value for name, value in settings.items() if value is not None})


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"
