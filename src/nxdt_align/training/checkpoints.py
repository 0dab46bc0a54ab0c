"""When a checkpoint is written and what ranks it: NeMo's callback, with values of the step that is saved."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from nemo.utils.callbacks import NeMoModelCheckpoint
from torch import Tensor

from nxdt_align.training.module import AlignmentModule
from nxdt_align.training.strategy import checkpoint_folder


class RunCheckpoint(NeMoModelCheckpoint):  # type: ignore[misc]
    """NeMo's callback of ``exp_manager``, but a checkpoint is written at the step at which it is due, and its
    rank and its name hold metrics of that step.

    Where ``monitor`` or ``filename`` needs a metric of validation, validation runs first. Lightning's own
    takes the newest value that there is, and puts off what is due at an epoch's last step to the next
    validation, steps later.

    ``save_for_resume`` writes one for the restart alone where it would not be among the best. It has no
    rank, and goes when the next is written.
    """

    save_weights_only: bool
    _last_time_checked: float | None
    after_save: Callable[[Trainer], None] | None = None
    """Called when one that was due by steps or time is written."""
    _awaits_validation = False
    _unranked = ""
    """What ``save_for_resume`` has left."""

    @classmethod
    def adopt(cls, trainer: Trainer) -> RunCheckpoint | None:
        """Make NeMo's callback one of this class, where ``exp_manager`` has made one: it takes no class."""
        callback: Any = trainer.checkpoint_callback
        if not isinstance(callback, NeMoModelCheckpoint):
            return None
        callback.__class__ = cls
        assert isinstance(callback, cls)
        interval: Any = callback._train_time_interval
        if isinstance(interval, Mapping):  # as a YAML says it
            callback._train_time_interval = timedelta(**interval)
        callback._validate_where_due(trainer)
        return callback

    @property
    def state_key(self) -> str:
        """NeMo's class's, so that checkpoints of either have the other's state."""
        key: str = super().state_key
        return key.replace(type(self).__qualname__, NeMoModelCheckpoint.__qualname__, 1)

    # What is due

    def validation_follows(self, trainer: Trainer) -> bool:
        """Whether validation runs after the step that has just been done, and has not ended."""
        loop: Any = trainer.fit_loop
        return not _validated(trainer) and (
            trainer.validating
            or bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
            or (self._due_by_steps(trainer) and self._uses_validation(trainer))
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Both: a look at the clock, over which the ranks agree, is not to depend on anything.
        due = self._due_by_time(trainer) | self._due_by_steps(trainer)
        if self._uses_validation(trainer):
            ends = self.is_last_step(trainer) or self._saves_at_epoch_end(trainer)
            self._awaits_validation = (due or ends) and not _validated(trainer)
        elif due and not self._should_skip_saving_checkpoint(trainer):
            self._save_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What a restart makes up for was awaited by an earlier process.
        made_up = self._due_by_steps(trainer) and self._uses_validation(trainer)
        awaited, self._awaits_validation = self._awaits_validation or made_up, False
        if not awaited or self._saves_at_epoch_end(trainer):
            super().on_validation_end(trainer, pl_module)
        elif not self._should_skip_saving_checkpoint(trainer):
            self._save_due(trainer)

    def _due_by_steps(self, trainer: Trainer) -> bool:
        return bool(self._every_n_train_steps >= 1) and trainer.global_step % self._every_n_train_steps == 0

    def _due_by_time(self, trainer: Trainer) -> bool:
        if self._train_time_interval is None:
            return False
        now, last = time.monotonic(), self._last_time_checked
        passed = last is not None and now - last >= self._train_time_interval.total_seconds()
        due = bool(trainer.strategy.broadcast(passed))  # clocks differ
        if due:
            self._last_time_checked = now
        return due

    def _saves_at_epoch_end(self, trainer: Trainer) -> bool:
        """Whether this is an epoch's last step, and the epoch's checkpoint comes right after validation."""
        is_last: bool = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        return is_last and due and self._should_save_on_train_epoch_end(trainer)

    def _save_due(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
        if self.after_save is not None:
            self.after_save(trainer)

    # For a restart

    @property
    def newest(self) -> Path:
        """The folder that was written last."""
        return checkpoint_folder(self._last_checkpoint_saved)

    def is_saved(self, trainer: Trainer) -> bool:
        """Whether the run can resume from the step that has just been done."""
        return self._last_global_step_saved == trainer.global_step and not self.save_weights_only

    def is_last_step(self, trainer: Trainer) -> bool:
        """Whether the run ends by itself after the step that has just been done."""
        loop = trainer.fit_loop
        is_last = loop.epoch_loop.batch_progress.is_last_batch
        last_epoch = is_last and trainer.current_epoch + 1 == loop.max_epochs
        return bool(trainer.should_stop or trainer.global_step == loop.max_steps or last_epoch)

    def save_for_resume(self, trainer: Trainer) -> None:
        """Write the step that has just been done, in full, over a checkpoint of it that there may be."""
        weights_only, self.save_weights_only = self.save_weights_only, False
        try:
            self._save_for_resume(trainer)
        finally:
            self.save_weights_only = weights_only

    def _save_for_resume(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        path = self.format_checkpoint_name(candidates)
        if path in self.best_k_models:
            self._save_checkpoint(trainer, path)
            return
        rank = candidates.get(self.monitor)
        if rank is not None and not torch.isnan(rank.float()):
            self._save_topk_checkpoint(trainer, candidates)
        if self._last_global_step_saved != trainer.global_step:
            self._save_checkpoint(trainer, path, unranked=True)

    def _save_checkpoint(self, trainer: Trainer, filepath: str, *, unranked: bool = False) -> None:
        before, self._unranked = self._unranked, filepath if unranked else ""
        super()._save_checkpoint(trainer, filepath)
        if before and before != filepath:
            self._remove_checkpoint(trainer, before)

    # Metrics of the step

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        candidates: dict[str, Tensor] = super()._monitor_candidates(trainer)
        wanted, module = self._wanted(), _module(trainer)
        # The module has shown consumed_samples, which is in the usual name, and need not ask the device.
        if not (wanted - {"consumed_samples"}).isdisjoint(module.step_metric_names):
            candidates |= {name: torch.tensor(value) for name, value in module.step_metrics().items()}
        if not _validated(trainer):
            # Of an earlier step, or of none: Lightning would write 0 into a name.
            stale = [name for name in wanted | candidates.keys() if self._is_of_validation(trainer, name)]
            candidates |= dict.fromkeys(stale, torch.tensor(torch.nan))
        return candidates

    def _wanted(self) -> set[str]:
        """The metrics in the rank and in the name, whose fields are found as Lightning does."""
        return {self.monitor, *re.findall(r"\{(.*?)[:\}]", self.filename or "")}

    def _uses_validation(self, trainer: Trainer) -> bool:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.enable_validation or "val" not in data.splits:
            return False
        known = trainer.callback_metrics.keys() | _module(trainer).step_metric_names | {"step", "epoch"}
        # What nothing has logged so far, validation may.
        return self.monitor not in known or any(
            self._is_of_validation(trainer, name) for name in self._wanted()
        )

    def _is_of_validation(self, trainer: Trainer, name: str) -> bool:
        """By its name, or by where it was logged."""
        results = trainer.fit_loop.epoch_loop.val_loop._results
        return name.startswith("val_") or any(item.meta.name == name for item in results.values())

    # Lightning's loop and the checkpoint's own state

    def _validate_where_due(self, trainer: Trainer) -> None:
        """Have Lightning's loop validate where a checkpoint waits for it, too."""
        loop: Any = trainer.fit_loop.epoch_loop
        scheduled = loop._should_check_val_fx
        loop._should_check_val_fx = lambda fetcher: self._awaits_validation or scheduled(fetcher)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()
        return state | ({"unranked": self._unranked} if self._unranked else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath"):
            self._unranked = state_dict.get("unranked", "")


def _module(trainer: Trainer) -> AlignmentModule:
    module = trainer.lightning_module
    assert isinstance(module, AlignmentModule)
    return module


def _validated(trainer: Trainer) -> bool:
    """Whether validation's metrics are of the newest step."""
    return _module(trainer).validated_step == trainer.global_step
