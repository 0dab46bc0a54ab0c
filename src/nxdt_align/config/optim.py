"""Names of optimizers and learning-rate schedules, and the settings that each takes.

From ``nemo/core/optim`` of NeMo 2.1.0 and ``torch.optim``, written down because importing either
takes seconds; a test compares the tables with the classes. ``adamw_fp32OptState`` and
``LinearAnnealingWithWarmUp`` are what NxDT adds to NeMo's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TORCH = ("foreach", "maximize", "differentiable")
_ADAM = ("betas", "eps", "weight_decay", "amsgrad", "capturable", "fused", *_TORCH)

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": _ADAM,
    "adamw_fp32OptState": ("betas", "eps", "weight_decay", "amsgrad", "capturable", "fused", "foreach"),
    "adam": (*_ADAM, "decoupled_weight_decay"),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov", "fused", *_TORCH),
    "adadelta": ("rho", "eps", "weight_decay", "capturable", *_TORCH),
    "adamax": ("betas", "eps", "weight_decay", "capturable", *_TORCH),
    "adagrad": ("lr_decay", "weight_decay", "initial_accumulator_value", "eps", "fused", *_TORCH),
    "rmsprop": ("alpha", "eps", "weight_decay", "momentum", "centered", "capturable", *_TORCH),
    "rprop": ("etas", "step_sizes", "capturable", *_TORCH),
    "novograd": (
        *("betas", "eps", "weight_decay", "grad_averaging", "amsgrad"),
        *("luc", "luc_trust", "luc_eps"),
    ),
    "adafactor": (
        *("eps", "clip_threshold", "decay_rate", "beta1", "weight_decay"),
        *("scale_parameter", "relative_step", "warmup_init", "min_step"),
    ),
    "adan": ("betas", "eps", "weight_decay", "max_grad_norm", "no_prox", "foreach", "fused"),
}
"""Optimizer -> settings beside lr."""

BETAS = {"adan": 3}
"""Optimizer -> values of ``betas``, where they are not two."""

_WARMUP = ("warmup_steps", "warmup_ratio", "max_steps", "min_lr")
_CONSTANT = ("constant_steps", "constant_ratio", "max_steps", "min_lr")
_HOLD = ("hold_steps", "hold_ratio", *_WARMUP)

SCHEDULERS: dict[str, tuple[str, ...]] = {
    "LinearAnnealingWithWarmUp": ("warmup_steps", "max_steps"),
    "CosineAnnealing": ("constant_steps", "constant_ratio", *_WARMUP),
    "WarmupPolicy": _WARMUP,
    "WarmupHoldPolicy": _HOLD,
    "SquareAnnealing": _WARMUP,
    "SquareRootAnnealing": _WARMUP,
    "NoamAnnealing": ("d_model", *_WARMUP),
    "NoamHoldAnnealing": ("decay_rate", *_HOLD),
    "WarmupAnnealing": _WARMUP,
    "InverseSquareRootAnnealing": _WARMUP,
    "T5InverseSquareRootAnnealing": _CONSTANT,
    "PolynomialDecayAnnealing": ("power", "cycle", *_WARMUP),
    "PolynomialHoldDecayAnnealing": ("power", "cycle", *_HOLD),
    "StepLR": ("step_size", "gamma"),
    "ExponentialLR": ("gamma",),
    "CyclicLR": (
        *("base_lr", "max_lr", "step_size_up", "step_size_down", "mode", "gamma"),
        *("scale_mode", "cycle_momentum", "base_momentum", "max_momentum"),
    ),
}
"""Schedule -> settings."""

REFUSED_SCHEDULERS = {
    "ReduceLROnPlateau": "it waits for a metric at the end of each epoch, which a run in steps does not have"
}
"""Schedules of NeMo's that no run can have -> why."""

REQUIRED_SCHEDULER_SETTINGS: dict[str, tuple[str, ...]] = {
    "NoamAnnealing": ("d_model",),
    "StepLR": ("step_size",),
    "ExponentialLR": ("gamma",),
    "CyclicLR": ("base_lr", "max_lr"),
}

OTHER_SCHEDULER_KEYS = ("last_epoch", "monitor", "reduce_on_plateau", "iters_per_batch", "t_max_epochs")
"""Keys of NeMo's YAMLs that no schedule takes: a run keeps its own place and length."""


def known_optimizer_settings() -> frozenset[str]:
    """What any optimizer takes."""
    return frozenset(key for keys in OPTIMIZERS.values() for key in keys)


def known_scheduler_settings() -> frozenset[str]:
    """What any schedule takes, and what NeMo's YAMLs have beside."""
    return frozenset(OTHER_SCHEDULER_KEYS).union(*SCHEDULERS.values())


def accepted_optimizer_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without what only other optimizers take; as it is where ``name`` is not known."""
    return _accepted(given, ("lr", *OPTIMIZERS[name]) if name in OPTIMIZERS else None)


def accepted_scheduler_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without what only other schedules take; as it is where ``name`` is not known."""
    return _accepted(given, SCHEDULERS.get(name))


def _accepted(given: Mapping[str, Any], taken: tuple[str, ...] | None) -> dict[str, Any]:
    return {key: value for key, value in given.items() if taken is None or key in taken}
