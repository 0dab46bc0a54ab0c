"""Runs one after another, each in its own folder, and their report; what is finished is not repeated."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nxdt_align.config.load import quoted
from nxdt_align.config.start import METRICS_FILE, SETTINGS_FILE
from nxdt_align.errors import UserError
from nxdt_align.evaluation.settings import flat
from nxdt_align.files import atomic_write
from nxdt_align.messages import NOTICE
from nxdt_align.run.report import report

log = logging.getLogger(__name__)

STATE_FILE, PAGE = "sweep.json", "report.html"
_WANDB_NAME = "exp_manager.wandb_logger_kwargs.name"


@dataclass(frozen=True)
class SweepRun:
    """One of them."""

    label: str
    """The name of its folder in the sweep's."""
    overrides: tuple[str, ...]
    settings: str
    """Its resolved YAML."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.settings.encode()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Overrides that have the label in the name that the run would share with the others in W&B. Where
        none is given, it is called as its folder."""
        settings = flat(yaml.safe_load(self.settings))
        given = settings.get(_WANDB_NAME)
        if not (settings.get("exp_manager.create_wandb_logger") and given):
            return ()
        return (f"{_WANDB_NAME}={quoted(f'{self.label} {given}')}",)


@dataclass
class Sweep:
    """A folder of runs, with ``sweep.json``: of each its overrides, a digest of its settings and the exit
    status of its newest process.

    Args:
        start: runs one to its end, with its overrides and its label; returns the exit status, or None where
            it was stopped and nothing more is to be started.
    """

    folder: Path
    start: Callable[[SweepRun], int | None]
    statuses: dict[str, int] = field(default_factory=dict)
    """Label -> exit status of what has ended so far."""

    def run(self, runs: Sequence[SweepRun]) -> bool:
        """Start those that are not finished; returns False where it was stopped before the end.

        Raises UserError where the folder has a run of the same label with other settings.
        """
        state = self._read()
        for each in runs:
            known = state.get(each.label)
            if known is not None and known["settings"] != each.digest:
                raise UserError(
                    f"{self.folder / each.label} is a run of an earlier sweep with other settings: --out "
                    f"names another folder; or remove {self.folder}"
                )
        for number, each in enumerate(runs, start=1):
            at = f"sweep: run {number} of {len(runs)}, {each.label}"
            if self._is_finished(each, state):
                log.log(NOTICE, "%s: finished before", at)
                self.statuses[each.label] = 0
                continue
            log.log(NOTICE, "%s", at)
            status = self.start(each)
            known = {"overrides": list(each.overrides), "settings": each.digest, "status": status}
            state[each.label] = known
            self._write(state)
            if status is None:
                return False
            self.statuses[each.label] = status
            if status:
                log.error("%s: failed with status %d; the others go on", at, status)
        return True

    @property
    def failed(self) -> list[str]:
        return [label for label, status in self.statuses.items() if status]

    def report(self) -> tuple[Path, list[tuple[str, str]]] | None:
        """The page of all runs that have logged anything, and each one's verdict; None where none has."""
        logged = [label for label in self.statuses if (self.folder / label / METRICS_FILE).is_file()]
        if not logged:
            return None
        page, verdicts = report([self.folder / label for label in logged], self.folder / PAGE)
        return page, list(zip(logged, verdicts, strict=True))

    def _is_finished(self, run: SweepRun, state: Mapping[str, Any]) -> bool:
        known = state.get(run.label)
        is_there = (self.folder / run.label / SETTINGS_FILE).is_file()
        return known is not None and known["status"] == 0 and is_there

    def _read(self) -> dict[str, Any]:
        file = self.folder / STATE_FILE
        if not file.is_file():
            return {}
        try:
            state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["runs"]
            for known in state.values():
                known["settings"], known["status"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} cannot be read: {' '.join(str(error).split())}; remove it, and finished runs are "
                "looked at again and go on from their checkpoints"
            ) from error
        return state

    def _write(self, state: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / STATE_FILE, json.dumps({"runs": state}, indent=2).encode())
