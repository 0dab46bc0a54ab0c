"""Callbacks that only observe a run: compilations, devices, start-up times."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nxdt_align.batch import Batch
from nxdt_align.engines.base import Compiler, Shapes, shapes_of
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.neuron.monitor import NeuronMonitor

log = logging.getLogger(__name__)

ALLOWED = 2
"""Steps of each shape that may compile. The first creates the optimizer's state, so the second is another
graph."""


class RecompileGuard(Callback):
    """Reports compilations after the first two steps of each shape: a graph takes minutes to compile on
    Trainium, so one per step would stall a run. Where the graphs were compiled ahead, any other, too.

    Must come after the callback of the reference pass, whose graphs are looked at before the first step.

    Args:
        stop: raise UserError at an unexpected compilation instead of warning
            (``exp_manager.fail_on_recompile``).
        ahead: keys of the graphs that COMPILE=1 listed; None where it was not run.
    """

    def __init__(self, compiler: Compiler, *, stop: bool, ahead: Collection[str] | None = None) -> None:
        self._compiler, self._stop, self._ahead = compiler, stop, ahead
        self._visits: Counter[tuple[str, Shapes]] = Counter()
        self._before = self._looked_at = 0
        self._told: set[str] = set()
        """Keys of graphs that were not compiled ahead, as was said."""
        self.surprises = 0
        """Unexpected compilations so far."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_listed("what ran before the first step")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._before = self._compiler.count()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check("step", f"step {trainer.global_step}", batch)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._before = self._compiler.count()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        where = f"batch {batch_idx} of the validation after step {trainer.global_step}"
        self._check("validation", where, batch)

    def _check(self, kind: str, where: str, batch: Sequence[Batch]) -> None:
        shapes = shapes_of(batch)
        self._visits[kind, shapes] += 1
        compiled = self._compiler.count() - self._before
        if compiled == 0 or self._visits[kind, shapes] <= ALLOWED:
            self._check_listed(where)
            return
        self.surprises += compiled
        earlier = self._visits[kind, shapes] - 1
        message = (
            f"{where} compiled {compiled} graph(s), although {earlier} batches of its shapes preceded it: "
            f"{describe(shapes)}. A number that changes from step to step has become a constant of the "
            "graph, e.g. an optimizer setting, or a value that a custom loss reads"
        )
        self._say(message)

    def _check_listed(self, where: str) -> None:
        """Of the graphs that are new since the last look."""
        count = self._compiler.count()
        if self._ahead is None or count == self._looked_at:
            return
        self._looked_at = count
        graphs = self._compiler.graphs() or {}
        others = [key for key in graphs if key not in self._ahead and key not in self._told]
        if not others:
            return
        self._told.update(others)
        names = Counter(graphs[key].name for key in others)
        self._say(
            f"{where} needed {len(others)} graph(s) that COMPILE=1 has not compiled ahead "
            f"({', '.join(f'{count} of {name}' for name, count in names.items())}): a setting differs from "
            "what it was run with. COMPILE=1 with the same overrides compiles them"
        )

    def _say(self, message: str) -> None:
        if self._stop:
            raise UserError(f"exp_manager.fail_on_recompile: {message}; False only warns")
        log.warning("%s", message)


def describe(shapes: Shapes) -> str:
    """The micro-batches' shapes in words."""
    return "; ".join(
        f"{count} micro-batch(es) of {rows} row(s) x {tokens} tokens, {responses} response tokens and "
        f"{slots} responses per row"
        for (rows, tokens, responses, slots), count in Counter(shapes).items()
    )


class DeviceMonitor(Callback):
    """Logs ``monitor``'s newest report at the logging interval, at the number of optimizer steps done.

    One process per node has this callback. Lightning's loggers write only on the first node; on the others
    only the monitor's warnings appear.
    """

    def __init__(self, monitor: NeuronMonitor, every_n_steps: int) -> None:
        self._monitor = monitor
        self._every_n_steps = every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitor.start()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        report = self._monitor.newest() if step % self._every_n_steps == 0 else None
        if report is not None:
            for logger in trainer.loggers:
                logger.log_metrics(report.metrics(), step=step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitor.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._monitor.stop()


class StartTimes(Callback):
    """Logs the seconds that each part of the start took, up to the end of the first step.

    Must be the first callback, since it times the parts of the others.
    """

    def __init__(self, *, enabled: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._enabled, self._clock = enabled, clock
        self._began = self._last = clock()

    def done(self, what: str) -> None:
        """Log the time of ``what``, which has just finished."""
        now = self._clock()
        if self._enabled:
            times = now - self._last, now - self._began
            log.log(NOTICE, "start: %s: %.2f s (%.2f s so far)", what, *times)
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
