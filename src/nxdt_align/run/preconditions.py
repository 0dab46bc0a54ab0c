"""What can be found wrong before the first step, and Lightning's complaints as this package's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError


def require_validation_in_epoch(config: Config, steps_per_epoch: int) -> None:
    """Raise UserError where validation would be due after the end of each epoch."""
    trainer, limit = config.trainer, config.trainer.limit_train_batches
    if trainer.check_val_every_n_epoch is None or not isinstance(trainer.val_check_interval, int):
        return
    steps = min(steps_per_epoch, limit) if isinstance(limit, int) else int(steps_per_epoch * limit)
    if trainer.val_check_interval > steps:
        raise UserError(
            f"trainer.val_check_interval: must not be above the steps of an epoch ({steps}) while "
            f"check_val_every_n_epoch is set, but is {trainer.val_check_interval}; set "
            "trainer.check_val_every_n_epoch=null to count steps across epochs"
        )


_LOST = ("gloo/", "nccl", "timed out", "timeout", "connection closed", "connection reset")
"""What a RuntimeError of a collective says, lower-case, where another process does not answer."""


@contextmanager
def report_lost_ranks(world_size: int, timeout_minutes: float) -> Iterator[None]:
    """What torch.distributed raises where another process has ended, or hangs, becomes a UserError."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        is_lost = isinstance(error, dist.DistError) or any(sign in text.lower() for sign in _LOST)
        if world_size == 1 or not is_lost:
            raise
        cause = text.rpartition("] ")[2].partition(". ")[0][:150]
        raise UserError(
            f"another of the run's {world_size} processes has ended, or has not answered for "
            f"distributed_strategy.timeout_minutes ({timeout_minutes:g}): {cause}. Its own message says why; "
            "with exp_manager.resume_if_exists the run resumes from its newest checkpoint"
        ) from error


@contextmanager
def as_user_error() -> Iterator[None]:
    """Complaints of Lightning and W&B about settings that fit no rule here become a UserError."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"trainer, exp_manager: {' '.join(str(error).split())}") from error
    except Exception as error:
        # W&B, which need not be installed: most often there is no login.
        if not type(error).__module__.startswith("wandb.errors"):
            raise
        raise UserError(f"exp_manager.create_wandb_logger: {' '.join(str(error).split())}") from error
