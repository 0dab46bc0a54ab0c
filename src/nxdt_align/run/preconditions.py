"""Checks before the first step, and other libraries' errors as UserErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError


def require_validation_in_epoch(config: Config, steps_per_epoch: int) -> None:
    """Raise UserError if validation would never be due within an epoch."""
    (interval, epochs), limit = config.validation_interval, config.trainer.limit_train_batches
    if epochs is None or not isinstance(interval, int):
        return
    steps = min(steps_per_epoch, limit) if isinstance(limit, int) else int(steps_per_epoch * limit)
    if interval > steps:
        raise UserError(
            f"trainer.val_check_interval: must not be above the steps of an epoch ({steps}) while "
            f"check_val_every_n_epoch is set, but is {interval}; set "
            "trainer.check_val_every_n_epoch=null to count steps across epochs"
        )


_LOST = ("gloo/", "nccl", "timed out", "timeout", "connection closed", "connection reset")
"""Lower-case fragments of a collective's RuntimeError when another process does not answer."""


@contextmanager
def report_lost_ranks(world_size: int, timeout_minutes: float) -> Iterator[None]:
    """Turn torch.distributed's errors about a lost or hanging process into a UserError."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        is_lost = isinstance(error, dist.DistError) or any(sign in text.lower() for sign in _LOST)
        if world_size == 1 or not is_lost:
            raise
        # gloo prefixes "[file:line] " and appends a C++ backtrace after the first sentence.
        cause = text.rpartition("] ")[2].partition(". ")[0][:150]
        raise UserError(
            f"another of the run's {world_size} processes has ended, or has not answered for "
            f"distributed_strategy.timeout_minutes ({timeout_minutes:g}): {cause}. Its own message says why; "
            "with exp_manager.resume_if_exists the run resumes from its newest checkpoint"
        ) from error


_LOGGERS = {
    "wandb.errors": "exp_manager.create_wandb_logger",
    "mlflow": "exp_manager.create_mlflow_logger",
    "requests": "exp_manager: a logger's server",
}
"""Module of an error, or the package around it -> whose error it is. By name, as none need be installed.
Usually a login, a server or a run is missing."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn Lightning's, W&B's and MLflow's errors about settings and servers into a UserError."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"trainer, exp_manager: {' '.join(str(error).split())}") from error
    except Exception as error:
        module = f"{type(error).__module__}."
        key = next((key for name, key in _LOGGERS.items() if module.startswith(f"{name}.")), None)
        if key is None:
            raise
        raise UserError(f"{key}: {' '.join(str(error).split())}") from error
