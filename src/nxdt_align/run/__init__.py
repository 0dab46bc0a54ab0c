"""The composition root: a configuration becomes objects, and the objects are run."""

from __future__ import annotations

import logging

from nxdt_align.config.check import check, neuron_available, notices, resolve_engine
from nxdt_align.config.schema import Config
from nxdt_align.run.env import RunEnv

__all__ = ["RunEnv", "train"]

log = logging.getLogger(__name__)


def train(config: Config, env: RunEnv) -> int:
    """Train as configured; returns the exit status. Raises UserError for what the user can mend."""
    # Lightning and NeMo take seconds to import, which conversions do not need.
    from nxdt_align.run.assemble import end_processes
    from nxdt_align.run.preconditions import other_processes_are_there
    from nxdt_align.run.run import Run

    engine = resolve_engine(config, neuron_available())
    check(config, env.world_size, engine)
    if env.rank == 0:
        for notice in notices(config, engine):
            log.info("%s", notice)
    with other_processes_are_there(env.world_size, config.distributed_strategy.timeout_minutes):
        status = Run(config, env).fit()
        end_processes()
    return status
