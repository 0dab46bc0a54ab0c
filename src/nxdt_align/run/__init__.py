"""The composition root: builds objects from a configuration and runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from nxdt_align.config.check import CheckedConfig
from nxdt_align.config.schema import Config
from nxdt_align.messages import NOTICE, RunLog
from nxdt_align.run.contracts import RunEnv
from nxdt_align.stop_signals import Stopped

if TYPE_CHECKING:
    # Lightning and NeMo take seconds to import, which conversions do not need.
    from lightning.pytorch import Callback

    from nxdt_align.losses.types import Loss
    from nxdt_align.run.contracts import Result
    from nxdt_align.run.mode import RunMode
    from nxdt_align.run.run import Run

__all__ = ["RunEnv", "in_run", "train"]

T = TypeVar("T")

log = logging.getLogger(__name__)


def train(
    checked: CheckedConfig,
    env: RunEnv,
    *,
    loss: Loss | Callable[..., Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train as configured, or do a dry run if ``env.compile_only``.

    Raises UserError for user errors, and Stopped where ``env.signals`` has received a signal.
    """
    from nxdt_align.run.dry_run import DryRun
    from nxdt_align.run.mode import RunMode

    mode = DryRun() if env.compile_only else RunMode()
    return in_run(checked, env, mode, lambda run: run.fit(), loss=loss, callbacks=callbacks)


def in_run(
    checked: CheckedConfig,
    env: RunEnv,
    mode: RunMode,
    act: Callable[[Run], T],
    *,
    loss: Loss | Callable[..., Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> T:
    """What ``act`` does with the run; its processes end together. Raises as ``train``."""
    from nxdt_align.run.preconditions import report_lost_ranks
    from nxdt_align.run.processes import end_processes
    from nxdt_align.run.run import Run

    config = checked.config
    if env.rank == 0:
        for notice in checked.engine_notices:
            log.log(NOTICE, "notice: %s", notice)
    lost = report_lost_ranks(env.world_size, config.distributed_strategy.timeout_minutes)
    try:
        with RunLog(keeps=env.rank == 0) as run_log, lost:
            run = Run(config, checked.engine, env, mode, run_log, loss=loss, callbacks=callbacks)
            result = act(run)
            end_processes()
    except Stopped as stopped:
        if env.rank == 0:
            stopped.tell(f"to go on: {_command(config, env, stopped)}")
        if stopped.together:
            end_processes()
        raise
    return result


def _command(config: Config, env: RunEnv, stopped: Stopped) -> str:
    """The user's command, by which the run resumes from what is saved."""
    resumes = config.exp_manager.resume_if_exists or not stopped.is_saved
    key = "" if resumes else " exp_manager.resume_if_exists=True"
    return (env.command or "the same call again") + key
