"""What NeMo's exp_manager would refuse of its settings, found without a folder, a logger or a trainer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.timer import Timer
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nxdt_align.config.experiment import ExpManagerConfig
from nxdt_align.errors import UserError
from nxdt_align.training.experiment import nemo_settings


def check_experiment(config: ExpManagerConfig) -> None:
    """Raise UserError for settings of ``exp_manager`` with which ``start_experiment`` would stop.

    Makes the parts that judge their own arguments, and drops them.
    """
    # These imports take seconds: only a training run pays for them.
    from nemo.utils import exp_manager as nemo

    merged: Any = _judged(
        "", lambda: OmegaConf.merge(OmegaConf.structured(nemo.ExpManagerConfig), nemo_settings(config, nemo))
    )
    if config.create_checkpoint_callback:
        params = {
            k: v for k, v in merged.checkpoint_callback_params.items() if k not in ("filepath", "prefix")
        }
        # A folder is given, since without one the callback wants a trainer.
        params |= {"dirpath": "checkpoints", "prefix": "checkpoint"}
        callback: Any = _judged(
            ".checkpoint_callback_params", lambda: nemo.NeMoModelCheckpoint(n_resume=False, **params)
        )
        _check_filename(callback)
    if config.create_early_stopping_callback:
        given = merged.early_stopping_callback_params
        _judged(".early_stopping_callback_params", lambda: EarlyStopping(**given))
    if config.log_step_timing or config.log_delta_step_timing:
        given = merged.step_timing_kwargs
        _judged(".step_timing_kwargs", lambda: nemo.TimingCallback(timer_kwargs=given))
    if config.max_time_per_run is not None:
        _judged(".max_time_per_run", lambda: Timer(config.max_time_per_run))


def _check_filename(callback: Any) -> None:
    """Fill in the name of a checkpoint, once with counts and once with fractions, as metrics are either."""
    if callback.filename is None:
        return
    reasons = []
    for value in (1, 1.5):
        names = re.findall(r"\{([^:}]*)", callback.filename)
        metrics = {
            "epoch": 1,
            "step": 1,
            **{n: torch.tensor(value) for n in names if n not in ("epoch", "step")},
        }
        try:
            callback.format_checkpoint_name(metrics)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            reasons.append(str(error))
    if len(reasons) == 2:
        raise UserError(
            f"exp_manager.checkpoint_callback_params.filename: cannot be filled in ({reasons[0]}), but is "
            f"{callback.filename!r}; write a metric as {{step}} or {{val_loss:.4f}}"
        )


def _judged(part: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, TypeError, KeyError, MisconfigurationException, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None)
        place = f".{key}" if key and not part else part
        reason = str(error).partition("\n    full_key")[0]
        raise UserError(f"exp_manager{place}: {' '.join(reason.split())}") from error
