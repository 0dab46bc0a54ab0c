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

FIXED_SETTINGS = {"adafactor": dict.fromkeys(("relative_step", "scale_parameter", "warmup_init"), False)}
"""Optimizer -> settings that have one value here, as its documentation has it for a learning rate from
outside. With another one adafactor sets its step size itself, and NeMo's class writes the result back into
the group's learning rate at each parameter, so that it compounds."""

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

DEFAULT_MIN_LR = {"SquareAnnealing": 1e-5}
"""Schedule -> its ``min_lr`` where none is given, if that is not 0."""

OTHER_SCHEDULER_KEYS = ("last_epoch", "monitor", "reduce_on_plateau", "iters_per_batch", "t_max_epochs")
"""Keys of NeMo's YAMLs that no schedule takes: a run keeps its own place and length."""


def accepted_settings(
    table: Mapping[str, tuple[str, ...]], name: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """``given`` without what only other names of the table take; as it is where ``name`` is not in it."""
    return {key: value for key, value in given.items() if key in table.get(name, given)}
