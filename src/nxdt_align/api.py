"""The entry points of scripts and notebooks: load a configuration, and train with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxdt_align.config import load
from nxdt_align.config.check import checked
from nxdt_align.config.schema import Config

if TYPE_CHECKING:
    # They take seconds to import.
    from lightning.pytorch import Callback

    from nxdt_align.losses.types import Loss
    from nxdt_align.run.contracts import Result


def load_config(name_or_path: str | Path, *overrides: str) -> Config:
    """The configuration of a YAML, as ``nxdt-align config`` shows it.

    Args:
        name_or_path: a config that ``nxdt-align presets`` lists, or the path of a YAML.
        overrides: ``"key=value"`` each, with Hydra's ``+``, ``++`` and ``~`` before the key.

    Files that it names need not exist yet. Raises ConfigError (a ValueError) with every unknown key and
    every value of a wrong type; ``train`` checks the rest.
    """
    return load.load_config(str(name_or_path), overrides)


def train(
    config: Config, loss: Loss | Callable[..., Any] | None = None, callbacks: Sequence[Callback] = ()
) -> Result:
    """Train with ``config`` in this process, one of those that ``torchrun`` started or the only one.

    Args:
        config: from ``load_config``, or made by hand.
        loss: instead of the objective's own: one of this package's losses, or a custom loss, called as
            (policy, reference), in this package's signature or torchtune's. Its ``repr`` is part
            of the run's identity.
        callbacks: Lightning's, after those that ``trainer.callbacks`` names.

    Returns the run's outputs. A run of the same objective, data, start weights and model resumes if
    ``exp_manager.resume_if_exists`` is set. Raises ConfigError with every fault of ``config``, and UserError
    (a ValueError, too) for faulty data or weights, or an unsuitable machine. SIGTERM, SIGINT and SIGUSR1 end
    the run with a checkpoint and a SystemExit of 128 + the signal's number, unless
    ``exp_manager.create_preemption_callback`` is False or this is not the main thread.
    """
    from nxdt_align.cli_process import Environment, enter_run

    environment = Environment.of_this_process()
    found = environment.with_told_cores(checked(config, environment.world_size))
    signals = environment.stop_signals()
    if config.exp_manager.create_preemption_callback:
        signals.install()
    try:
        env = enter_run(found, environment, signals, command=environment.command)
        from nxdt_align import run

        return run.train(found, env, loss=loss, callbacks=callbacks)
    finally:
        signals.uninstall()
