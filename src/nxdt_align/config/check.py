"""Check a configuration before anything is built from it; one message reports every fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nxdt_align.config.engines import Engine, find_engine_faults, notices, resolve_engine
from nxdt_align.config.faults import ConfigError, Fault, independent
from nxdt_align.config.load import read_config
from nxdt_align.config.loggers import logger_faults
from nxdt_align.config.neuron_packages import neuron_available
from nxdt_align.config.paths import path_faults, positions_notice, tokenizer_notice
from nxdt_align.config.rules import NOTICES, RULES
from nxdt_align.config.schema import Config

__all__ = [
    "CheckedConfig",
    "ConfigError",
    "Fault",
    "check_notices",
    "checked",
    "find_faults",
    "load_checked",
    "with_check",
]


@dataclass(frozen=True)
class CheckedConfig:
    """A configuration without faults on this machine; created once per process."""

    config: Config
    engine: Engine
    """The engine that runs it here."""
    notices: Sequence[str]
    """Notices for the user, none of them a fault."""
    engine_notices: Sequence[str]
    """Keys that have no effect on this engine."""


def checked(config: Config, world_size: int | None = None, faults: Sequence[Fault] = ()) -> CheckedConfig:
    """Check ``config`` against every rule and the limits of the engine that runs it on this machine.

    Args:
        world_size: the number of running processes, which must match the configuration.
        faults: those that reading it already found.

    Raises ConfigError with every fault.
    """
    engine = resolve_engine(config, neuron_available())
    found = with_check(config, faults, world_size, engine)
    if found:
        raise ConfigError(found, config.source)
    return CheckedConfig(config, engine, check_notices(config), notices(config, engine))


def check_notices(config: Config) -> list[str]:
    """Notices about a configuration without faults."""
    return [notice for rule in (*NOTICES, positions_notice, tokenizer_notice) for notice in rule(config)]


def load_checked(
    config_name_or_path: str,
    overrides: Sequence[str] = (),
    config_dir: Path | None = None,
    world_size: int | None = None,
) -> CheckedConfig:
    """``load_config`` and ``checked`` in one, with the faults of both in one ConfigError."""
    config, faults = read_config(config_name_or_path, overrides, config_dir)
    return checked(config, world_size, faults)


def with_check(
    config: Config, faults: Sequence[Fault], world_size: int | None = None, engine: Engine | None = None
) -> list[Fault]:
    """``faults`` from reading ``config``, then the faults of its values that do not follow from them."""
    return [*faults, *independent(find_faults(config, world_size, engine), faults)]


def find_faults(config: Config, world_size: int | None = None, engine: Engine | None = None) -> list[Fault]:
    """Every fault of ``config``, see ``checked``; checks an engine's limits only if one is given."""
    found = [fault for rule in RULES for fault in rule(config)]
    # world_size is below 1 only where devices or num_nodes is out of bounds, which has its own fault.
    if world_size is not None and config.world_size > 0 and world_size != config.world_size:
        found.append(_wrong_world(config, world_size))
    if engine is not None:
        found += find_engine_faults(config, engine)
    return [*found, *logger_faults(config), *path_faults(config)]


def _wrong_world(config: Config, world_size: int) -> Fault:
    trainer = config.trainer
    return Fault(
        "trainer.devices",
        f"times trainer.num_nodes must be the number of processes that run ({world_size}), but is "
        f"{trainer.devices} x {trainer.num_nodes} = {config.world_size}",
        advice="start with train.sh or torchrun, which take the number from the configuration, or set "
        f"trainer.devices={world_size}",
        involves=("trainer.num_nodes",),
    )
