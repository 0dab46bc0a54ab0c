"""Ends training after a step in which a signal has come, with a checkpoint of that step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer

from nxdt_align.engines.base import Engine, EngineError
from nxdt_align.stop_signals import Stopped, StopSignals

if TYPE_CHECKING:
    # Imports NeMo, which takes seconds.
    from nxdt_align.training.checkpoints import RunCheckpoint

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """After each step and each batch of validation, all ranks ask whether one of them has received a signal;
    if so, all save the same step and raise ``Stopped``.

    Must come after every callback whose state a checkpoint holds, and before the one that writes them, so
    that a step is not saved twice. Validation that was interrupted, or due after the step, is run by the
    process that resumes.

    Args:
        agree: the largest of all ranks' numbers, over the host: no device is waited for.
    """

    def __init__(self, engine: Engine, signals: StopSignals, agree: Callable[[int], int]) -> None:
        self._engine, self._signals, self._agree = engine, signals, agree
        self._checkpoint: RunCheckpoint | None = None
        self._validation_due = False

    def save_with(self, checkpoint: RunCheckpoint) -> None:
        self._checkpoint = checkpoint
        # A signal during a save would else count after another step.
        checkpoint.after_save = self._look

    # Where a signal is looked for

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._engine.lazy:  # there the first step compiles, which may take longer than there is time
            self._signals.hold()
        if self._validation_due:
            self._validate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._signals.hold()
        self._look(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if self._ends_by_itself(trainer):
            return
        number = self._agree(self._signals.received or 0)
        if number:
            self._stop(trainer, number)

    def _ends_by_itself(self, trainer: Trainer) -> bool:
        """Whether the run is about to end: it then validates and saves its last step anyway."""
        return self._checkpoint is not None and self._checkpoint.is_last_step(trainer)

    def before_export(self, trainer: Trainer) -> None:
        """When the last step is saved: from here on, a signal ends the run at once."""
        done = "is done" if self._checkpoint is None else "is saved"
        self._signals.situation = f"the last step, {trainer.global_step}, {done}, but the export is not"
        self._signals.is_saved = saved = self._checkpoint is not None
        number = self._agree(self._signals.received or 0)
        if number:
            self._signals.ending()
            raise Stopped(number, self._signals.situation, is_saved=saved, together=True)
        self._signals.release()

    # What is done then

    def _stop(self, trainer: Trainer, number: int) -> NoReturn:
        step = trainer.global_step
        if self._checkpoint is None:
            situation = (
                f"stopped after step {step}; exp_manager.create_checkpoint_callback: False saves nothing"
            )
        else:
            path = self._save(trainer, self._checkpoint)
            situation = f"stopped after step {step}, which is saved: {path}"
        self._signals.ending()
        raise Stopped(number, situation, is_saved=self._checkpoint is not None, together=True)

    def _save(self, trainer: Trainer, checkpoint: RunCheckpoint) -> Path:
        try:
            self._engine.finish_saving()
        except EngineError as error:
            log.error("%s", error)
        self._validation_due = checkpoint.validation_follows(trainer)
        # A checkpoint of this step that is written already does not tell of that.
        if checkpoint.is_saved(trainer) and not self._validation_due:
            return checkpoint.newest
        checkpoint.save_for_resume(trainer)
        self._engine.finish_saving()
        return checkpoint.newest

    def _validate(self, trainer: Trainer) -> None:
        """The validation that an earlier process owes, as Lightning's loop runs it."""
        loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
        loop.restarting = False  # from its start, as the earlier batches' values are gone
        first = connector._first_loop_iter
        trainer.validating = True
        loop.run()
        trainer.training = True
        connector._first_loop_iter = first
        loop._has_run = False  # in the loop's own turn, at which a restarted epoch may end
        self._validation_due = False

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": True} if self._validation_due else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_due = bool(state_dict.get("validation_due"))
