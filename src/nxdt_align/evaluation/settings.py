"""The settings of a run's folder, and what several runs' differ in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nxdt_align.config.start import IDENTITY_FILE, SETTINGS_FILE

Settings = dict[str, Any]
"""Dotted key -> value; a list is one value."""
_PLACES = (
    *("exp_manager.explicit_log_dir", "exp_manager.exp_dir", "exp_manager.name", "exp_manager.version"),
    "exp_manager.wandb_logger_kwargs.name",
)
"""Where a run writes, and what it is called there: two runs always differ in it, and it changes nothing."""


def read_settings(run: Path) -> Settings:
    """Of config.yaml; of a run of an earlier version, which has none, the objective alone. Empty where
    nothing can be read."""
    try:
        if (run / SETTINGS_FILE).is_file():
            return flat(yaml.safe_load((run / SETTINGS_FILE).read_text(encoding="utf-8")))
        said = json.loads((run / IDENTITY_FILE).read_text(encoding="utf-8"))
        return flat({"model_alignment_strategy": said["of"]["objective"]})
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError):
        return {}


def flat(values: Any, prefix: str = "") -> Settings:
    """Nested mappings as dotted keys."""
    if not isinstance(values, Mapping) or not values:
        return {prefix.removesuffix("."): values} if prefix else {}
    found: Settings = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.")
    return found


def differing(settings: Sequence[Settings]) -> dict[str, list[Any]]:
    """Keys of which the runs have different values, and each run's; None where it has none."""
    keys = dict.fromkeys(key for each in settings for key in each if key not in _PLACES)
    found = {key: [each.get(key) for each in settings] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
