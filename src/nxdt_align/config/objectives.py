"""Rules on model_alignment_strategy that look at several of its keys, and notices on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nxdt_align.config.alignment import (
    ABSOLUTE_LOSSES,
    OBJECTIVES,
    SMOOTHED_LOSSES,
    SORTING_LOSSES,
    DPOConfig,
    DPOLossType,
)
from nxdt_align.config.faults import Fault
from nxdt_align.config.schema import Config

_ALIGN = "model_alignment_strategy"
_DPO = f"{_ALIGN}.dpo"
_WITHOUT_REFERENCE = "these do without: sigmoid, robust, ipo, hinge, exo_pair, discopop, sigmoid_norm"


def dpo_forms(config: Config) -> Iterator[Fault]:
    """What each form of DPO can be combined with."""
    dpo = config.model_alignment_strategy.dpo
    if dpo is None:
        return
    if not dpo.loss_types:
        yield Fault(f"{_DPO}.loss_type", "must name at least one loss", [])
    for name in dpo.loss_types:
        yield from _combinations(dpo, name)
    if dpo.reference_free and dpo.f_divergence_type != "reverse_kl":
        rule = f"must be False with f_divergence_type {dpo.f_divergence_type}, a divergence from a reference"
        yield Fault(f"{_DPO}.reference_free", rule, True, involves=(f"{_DPO}.f_divergence_type",))


def _combinations(dpo: DPOConfig, name: DPOLossType) -> Iterator[Fault]:
    involves = (f"{_DPO}.loss_type",)
    if name in ABSOLUTE_LOSSES and dpo.reference_free:
        rule = f"must be False with loss_type {name}, which needs a reference"
        yield Fault(f"{_DPO}.reference_free", rule, True, _WITHOUT_REFERENCE, involves)
    if name in ABSOLUTE_LOSSES and dpo.f_divergence_type != "reverse_kl":
        rule = f"must be reverse_kl with loss_type {name}"
        yield Fault(f"{_DPO}.f_divergence_type", rule, dpo.f_divergence_type, involves=involves)
    if name in SORTING_LOSSES and dpo.use_weighting:
        rule = f"must be False with loss_type {name}, which sorts, so that no pair has a loss of its own"
        yield Fault(f"{_DPO}.use_weighting", rule, True, involves=involves)
    if name == "exo_pair" and dpo.label_smoothing == 0:
        rule = "must be above 0 with loss_type exo_pair, whose target it is"
        yield Fault(f"{_DPO}.label_smoothing", rule, 0.0, "leave it out for the paper's 0.001", involves)
    if name == "sigmoid_norm" and dpo.length_normalization is False:
        rule, advice = "must not be False with loss_type sigmoid_norm", "loss_type sigmoid is it without"
        yield Fault(f"{_DPO}.length_normalization", rule, advice=advice, involves=involves)


def loss_weights(config: Config) -> Iterator[Fault]:
    dpo = config.model_alignment_strategy.dpo
    if dpo is None or dpo.loss_weights is None:
        return
    path, weights = f"{_DPO}.loss_weights", dpo.loss_weights
    if len(weights) != len(dpo.loss_types):
        rule = f"must have one weight for each loss_type ({len(dpo.loss_types)}: {', '.join(dpo.loss_types)})"
        yield Fault(path, rule, weights, involves=(f"{_DPO}.loss_type",))
    if any(weight < 0 for weight in weights) or not any(weights):
        yield Fault(path, "must be at least 0, and not all 0", weights)


def kto_weights(config: Config) -> Iterator[Fault]:
    kto = config.model_alignment_strategy.kto
    if kto is not None and kto.desirable_weight == kto.undesirable_weight == 0:
        rule = "must be above 0 where undesirable_weight is 0: nothing would be trained"
        other = f"{_ALIGN}.kto.undesirable_weight"
        yield Fault(f"{_ALIGN}.kto.desirable_weight", rule, 0.0, involves=(other,))


def own_loss(config: Config) -> Iterator[Fault]:
    strategy = config.model_alignment_strategy
    path = strategy.loss
    if path is None:
        if strategy.loss_settings:
            rule = f"must not be set without {_ALIGN}.loss"
            yield Fault(f"{_ALIGN}.loss_settings", rule, dict(strategy.loss_settings))
    elif "." not in path or not all(part.isidentifier() for part in path.split(".")):
        yield Fault(f"{_ALIGN}.loss", "must be a dotted path, module.name", path)


RULES: tuple[Callable[[Config], Iterator[Fault]], ...] = (dpo_forms, loss_weights, kto_weights, own_loss)


# Notices

_ONLY_FOR: dict[str, frozenset[str]] = {
    "label_smoothing": SMOOTHED_LOSSES,
    "gamma": frozenset({"hinge"}),
    "discopop_tau": frozenset({"discopop"}),
    "bco_reward_shift": frozenset({"bco_pair"}),
}
"""Key of dpo -> the forms that it counts for."""
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
    """Keys of dpo that were set, and that none of its forms reads."""
    dpo = config.model_alignment_strategy.dpo
    if dpo is None:
        return
    idle = [
        f"{_DPO}.{key}"
        for key, forms in _ONLY_FOR.items()
        if f"{_DPO}.{key}" in config.given and getattr(dpo, key) and not forms & set(dpo.loss_types)
    ]
    if dpo.f_divergence_type != "alpha_divergence" and f"{_DPO}.f_alpha_divergence_coef" in config.given:
        idle.append(f"{_DPO}.f_alpha_divergence_coef")
    if idle:
        kind = f"loss_type {', '.join(dpo.loss_types)} and f_divergence_type {dpo.f_divergence_type}"
        yield f"{', '.join(idle)}: no effect with {kind}"


def settings_of_the_replaced_loss(config: Config) -> Iterator[str]:
    """Settings of the objective's own loss, beside a loss that takes its place."""
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
