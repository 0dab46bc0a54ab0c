"""What a resumed run's YAML changes against its checkpoint, and what the checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ResumedSchedule:
    """What a checkpoint says of the learning rate."""

    settings: Mapping[str, str] | None
    """What decided it, see ``OptimizerPlan.settings``; None in a checkpoint of an earlier version."""
    schedule: Mapping[str, Any] | None
    """The scheduler's state, if there was a scheduler."""

    def changes(self, present: Mapping[str, str], rate: float) -> list[str]:
        """What the YAML changed, in words; ``rate``: the next step's, by the YAML."""
        if self.settings is not None:
            keys = [key for key in {**self.settings, **present} if self.settings.get(key) != present.get(key)]
            saved = self.settings
            return [
                f"model.optim.{k} was {saved.get(k, 'null')} and is {present.get(k, 'null')}" for k in keys
            ]
        saved_rate = rate if self.schedule is None else self.schedule["_last_lr"][0]
        if saved_rate == rate:
            return []
        return [f"model.optim changed: the checkpoint's learning rate for the next step was {saved_rate:g}"]


NOT_COMPARED = {"params", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}
"""Settings of an optimizer that the schedule sets, or that choose how a step is computed and not what."""


def overridden(
    given: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]], *, besides: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    """(setting, value given, value loaded) of the parameter groups where they differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for before, after in zip(given, loaded, strict=True):
        for key in before.keys() - NOT_COMPARED - set(besides):
            if _plain(before[key]) != _plain(after.get(key)):
                found.setdefault(key, (before[key], after.get(key)))
    return [(key, *values) for key, values in sorted(found.items())]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
