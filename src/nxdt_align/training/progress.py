"""How far a run is: one line that is redrawn on a terminal; elsewhere a line every so many steps, or every so
many minutes where time ends the run."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]

from nxdt_align.messages import NOTICE

log = logging.getLogger(__name__)

LINES = 50
"""At most about so many lines of steps of a run without a terminal, and as many of validations."""
LEAST_BAR = 1
"""Columns."""
_FIELDS = (
    ("loss", "reduced_train_loss", ".3f"),
    ("acc", "rewards/accuracies", ".2f"),
    ("margin", "rewards/margins", ".2f"),
    ("speed", "throughput", ".1f"),
    ("val loss", "val_loss", ".3f"),
    ("val acc", "val_rewards/accuracies", ".2f"),
    ("lr", "lr", ".2g"),
    ("grad", "gradient_norm", ".2f"),
    ("chosen", "rewards/chosen", ".2f"),
    ("rejected", "rewards/rejected", ".2f"),
)
"""Label, metric and format, most wanted first."""
_VAL_MARGIN = ("val margin", "val_rewards/margins", ".2f")
"""Of a validation's own line."""


class RunProgress(ProgressBar):
    """Steps of the whole run, the metrics that fit, and the time left.

    Args:
        steps: of the run; -1 where only time limits it.
        unit: what ``throughput`` counts.
        log_every_n_steps: at which metrics are new.
        seconds: after which the run ends, whose lines then follow the share of them that is used, or that of
            the steps where it is larger; None where no time limits it.
        is_terminal: whether a line can be redrawn; standard error's answer where not given.
    """

    def __init__(
        self,
        steps: int,
        unit: str,
        log_every_n_steps: int,
        *,
        seconds: float | None = None,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._seconds, self._clock = seconds, clock
        self._steps, self._unit, self._log_every = steps, unit, log_every_n_steps
        self._values: dict[str, float] = {}
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        wanted = max(1, steps // LINES)
        self._every = -(-wanted // log_every_n_steps) * log_every_n_steps
        self._enabled = True
        self._bar: Any = None
        self._began, self._from = 0.0, 0
        self._lines = {"step": 0, "validation": -1}
        """What ``_part`` was at the newest line of each kind."""

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        """Lightning's word for every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._from = self._clock(), trainer.global_step
        self._lines = {"step": self._part(trainer.global_step), "validation": -1}
        if self._enabled and self._is_terminal:
            self._bar = tqdm(
                total=self._steps if self._steps > 0 else None,
                initial=trainer.global_step,
                desc=self.text(trainer.global_step),
                bar_format="{desc} |{bar}| {remaining}" if self._steps > 0 else "{desc} {elapsed}",
                ncols=columns(),
                leave=True,
                file=sys.stderr,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._enabled and step % self._log_every == 0:
            self._read(trainer)
        if self._bar is not None:
            self._draw(step, "")
            self._bar.update(step - self._bar.n)
        has_values = step % self._log_every == 0 or step == self._steps
        if self._enabled and has_values and self._is_due("step", step):
            # The file of a run that has a terminal gets the same lines.
            level = logging.INFO if self._is_terminal else NOTICE
            log.log(level, "%s%s", self.text(step), self._left(step))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None and not trainer.sanity_checking:
            self._draw(trainer.global_step, "validation, ")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking:
            self._read(trainer)
            found = [
                f"{label.removeprefix('val ')} {self._values[name]:{form}}"
                for label, name, form in (*_FIELDS, _VAL_MARGIN)
                if label.startswith("val ") and name in self._values
            ]
            if found:
                shown = self._is_due("validation", trainer.global_step) or self._is_terminal
                level = NOTICE if shown else logging.INFO
                log.log(level, "validation at step %d: %s", trainer.global_step, ", ".join(found))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Of Lightning's ``self.print``."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def _part(self, step: int) -> int:
        """Of the run's parts, each of which has a line, the one that ``step`` is in now."""
        if self._seconds is None:
            return step // self._every
        used = (self._clock() - self._began) / self._seconds
        return int(max(used, step / self._steps if self._steps > 0 else 0.0) * LINES)

    def _is_due(self, kind: Literal["step", "validation"], step: int) -> bool:
        """Whether the first of its kind in its part of the run, or the last of all."""
        part = self._part(step)
        due = part > self._lines[kind] or step == self._steps
        self._lines[kind] = part
        return due

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _read(self, trainer: Trainer) -> None:
        """The metrics, where they are new: each may lie on the device, which a step must not wait for."""
        known = trainer.callback_metrics
        self._values = {name: float(known[name]) for _, name, _ in (*_FIELDS, _VAL_MARGIN) if name in known}

    def _draw(self, step: int, doing: str) -> None:
        self._bar.ncols = columns()
        width = columns() - LEAST_BAR - len(" || 00:00:00")
        text = doing + self.text(step, width - len(doing))
        self._bar.set_description_str(text, refresh=bool(doing))

    def text(self, step: int, width: int | None = None) -> str:
        """Of at most ``width`` columns: what does not fit is left out, the least wanted first."""
        text = f"step {step}" + (f"/{self._steps}" if self._steps > 0 else "")
        before = ": "
        for label, name, form in _FIELDS:
            if name not in self._values:
                continue
            value = f"{self._values[name]:{form}}"
            shown = f"{value} {self._unit}/s" if name == "throughput" else f"{label} {value}"
            if width is not None and len(text) + len(before) + len(shown) > width:
                break
            text, before = text + before + shown, ", "
        return text

    def _left(self, step: int) -> str:
        done = step - self._from
        if self._steps <= 0 or done <= 0 or step >= self._steps:
            return ""
        seconds = (self._clock() - self._began) / done * (self._steps - step)
        return f", {tqdm.format_interval(seconds)} left"


def seconds_of(duration: str) -> float:
    """Of days:hours:minutes:seconds, as ``trainer.max_time`` has them."""
    days, hours, minutes, seconds = map(int, duration.split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()


def columns() -> int:
    """Of the terminal: all but the last, behind which some begin a new line."""
    return shutil.get_terminal_size().columns - 1
