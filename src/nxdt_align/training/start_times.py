"""How long each part of a start or of a restart takes: ``enable_recovery_time_instrumentation``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class StartTimes(Callback):
    """Logs, in seconds, what each part took since the one before it, up to the end of the first step.

    As a callback it goes before all others, whose parts it times.
    """

    def __init__(self, *, enabled: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._enabled, self._clock = enabled, clock
        self._began = self._last = clock()

    def done(self, what: str) -> None:
        """``what`` has just come to its end."""
        now = self._clock()
        if self._enabled:
            log.info("start: %s: %.2f s (%.2f s so far)", what, now - self._last, now - self._began)
        self._last = now

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.done("trainer made" if trainer.ckpt_path is None else "checkpoint read")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.done("reference and optimizer ready")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._enabled:
            self.done("first step")
        self._enabled = False
