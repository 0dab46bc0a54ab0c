"""Counts what the device compiles, and says which step compiled what it should not have."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nxdt_align.batch import Batch
from nxdt_align.engines.base import Shapes, shapes_of
from nxdt_align.errors import UserError

log = logging.getLogger(__name__)

ALLOWED = 2
"""Steps of each shape that may compile: the second one's optimizer has a state."""


class RecompileGuard(Callback):
    """After the first two steps of each shape, no step compiles: a graph takes minutes to compile on
    Trainium, so that one a step would be the end of a run's speed.

    Args:
        compilations: graphs compiled so far in this process.
        stop: raise UserError at a surprise instead of a warning (``exp_manager.fail_on_recompile``).
    """

    def __init__(self, compilations: Callable[[], int], *, stop: bool) -> None:
        self._compilations = compilations
        self._stop = stop
        self._visits: Counter[tuple[str, Shapes]] = Counter()
        self._before = 0
        self.surprises = 0
        """Graphs compiled where none should be."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._before = self._compilations()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check("step", f"step {trainer.global_step}", batch)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._before = self._compilations()

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
        compiled = self._compilations() - self._before
        if compiled == 0 or self._visits[kind, shapes] <= ALLOWED:
            return
        self.surprises += compiled
        earlier = self._visits[kind, shapes] - 1
        message = (
            f"{where} compiled {compiled} graph(s), though {earlier} batches of its shapes came before it: "
            f"{describe(shapes)}. A number that changes from step to step has become a constant of the "
            "graph, as from an optimizer's setting or a loss of one's own that reads a value"
        )
        if self._stop:
            raise UserError(f"exp_manager.fail_on_recompile: {message}; False only warns")
        log.warning("%s", message)


def describe(shapes: Shapes) -> str:
    """The micro-batches' shapes in words."""
    return "; ".join(
        f"{count} micro-batch(es) of {rows} row(s) x {tokens} tokens, {responses} response tokens and "
        f"{slots} responses a row"
        for (rows, tokens, responses, slots), count in Counter(shapes).items()
    )
