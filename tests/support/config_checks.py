"""A configuration held to the rules alone, or to a chosen engine's limits too."""

from __future__ import annotations

from nxdt_align.config.check import ConfigError, check_notices, find_faults
from nxdt_align.config.engines import Engine
from nxdt_align.config.schema import Config


def check(config: Config, world_size: int | None = None, engine: Engine | None = None) -> list[str]:
    """Its notices. Raises ConfigError with every fault."""
    faults = find_faults(config, world_size, engine)
    if faults:
        raise ConfigError(faults, config.source)
    return check_notices(config)
