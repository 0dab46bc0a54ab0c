"""Notices on model_alignment_strategy: settings that the chosen objective does not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nxdt_align.config.alignment import OBJECTIVES
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.config.schema import Config

_ALIGN = "model_alignment_strategy"
_DPO = f"{_ALIGN}.dpo"
_OF_DATA = ("max_prompt_length", "truncation_mode", "precompute_ref_log_probs", "packing", "ld_alpha")


def reference_is_not_needed(config: Config) -> Iterator[str]:
    strategy = config.model_alignment_strategy
    unused = [k for k in ("reference_model", "reference_dtype") if getattr(strategy, k) is not None]
    if not unused or strategy.loss is not None:
        return
    names = " and ".join(f"{_ALIGN}.{key}" for key in unused)
    if strategy.dpo is None and strategy.kto is None:
        yield f"{names} has no effect: {strategy.objective} has no reference"
    elif strategy.dpo is not None and strategy.dpo.reference_free:
        yield f"{names} has no effect: dpo.reference_free leaves the reference out"


def settings_of_other_forms(config: Config) -> Iterator[str]:
    """Keys of dpo that are set but that none of the chosen forms reads."""
    dpo = config.model_alignment_strategy.dpo
    if dpo is None:
        return
    read = {key for name in dpo.loss_types for key in FORMS[name].reads}
    of_forms = dict.fromkeys(key for form in FORMS.values() for key in form.reads)
    idle = [
        f"{_DPO}.{key}"
        for key in of_forms
        if f"{_DPO}.{key}" in config.given and getattr(dpo, key) and key not in read
    ]
    if dpo.f_divergence_type != "alpha_divergence" and f"{_DPO}.f_alpha_divergence_coef" in config.given:
        idle.append(f"{_DPO}.f_alpha_divergence_coef")
    if idle:
        kind = f"loss_type {', '.join(dpo.loss_types)} and f_divergence_type {dpo.f_divergence_type}"
        yield f"{', '.join(idle)}: no effect with {kind}"


def settings_of_the_replaced_loss(config: Config) -> Iterator[str]:
    """Settings of the built-in loss that a custom loss replaces."""
    strategy = config.model_alignment_strategy
    if strategy.loss is None:
        return
    prefixes = [f"{_ALIGN}.{name}." for name in OBJECTIVES]
    idle = sorted(
        path
        for path in config.given
        if path.startswith(tuple(prefixes)) and path.rpartition(".")[2] not in _OF_DATA
    )
    if idle:
        yield f"{', '.join(idle)}: no effect, since {_ALIGN}.loss ({strategy.loss}) is the loss"


NOTICES: tuple[Callable[[Config], Iterator[str]], ...] = (
    *(reference_is_not_needed, settings_of_other_forms, settings_of_the_replaced_loss),
)
