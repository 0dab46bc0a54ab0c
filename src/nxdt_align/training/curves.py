"""TensorBoard's curves and the log files, without which a run goes on: a full disk must not end it.

Where a checkpoint finds no space either, the run stops with that message.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger

from nxdt_align.files import explain

log = logging.getLogger(__name__)


FIRST_CHARTS: Mapping[str, tuple[str, ...]] = {
    "loss": ("reduced_train_loss", "val_loss"),
    "reward accuracy": ("rewards/accuracies", "val_rewards/accuracies"),
    "reward margin": ("rewards/margins", "val_rewards/margins"),
    "log-probability of chosen and rejected responses": ("logps/chosen", "logps/rejected"),
    "log-probability per token": ("logps/chosen_per_token", "logps/rejected_per_token"),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "gradient norm": ("gradient_norm",),
    "learning rate": ("lr",),
}
"""Of TensorBoard's custom scalars: title -> metrics over each other."""
JUDGED_BY = ("reduced_train_loss", "val_loss", "val_rewards/accuracies", "val_rewards/margins")


class Curves(TensorBoardLogger):
    """Lightning's logger, which stops with one warning where its file cannot be written."""

    _has_stopped = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._has_stopped:
            return _DummyExperiment()
        try:
            return super().experiment
        except OSError as error:
            self._stop(error)
            return _DummyExperiment()

    def log_hyperparams(self, *arguments: Any, **settings: Any) -> None:
        self._attempt(lambda: super(Curves, self).log_hyperparams(*arguments, **settings))

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Show ``settings`` under HParams, beside the newest values of what a run is judged by.

        Not by Lightning's method, which logs values of these metrics, too: there are none yet.
        """
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}

        def write() -> None:
            writer = self.experiment
            if self._has_stopped:  # as its file could not be opened
                return
            summaries = hparams(plain, dict.fromkeys(JUDGED_BY, 0.0))  # type: ignore[no-untyped-call]
            for summary in summaries:
                writer._get_file_writer().add_summary(summary)

        self._attempt(write)

    def write_layout(self) -> None:
        """Group what one looks at first, under Custom scalars."""
        charts = {title: ["Multiline", list(names)] for title, names in FIRST_CHARTS.items()}
        self._attempt(lambda: self.experiment.add_custom_scalars({"Alignment": charts}))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._attempt(lambda: super(Curves, self).log_metrics(metrics, step), step)

    def write_text(self, name: str, markdown: str, step: int) -> None:
        """Show ``markdown`` under ``name``, as of ``step``."""
        self._attempt(lambda: self.experiment.add_text(name, markdown, step), step)

    def save(self) -> None:
        self._attempt(super().save)

    def finalize(self, status: str) -> None:
        self._attempt(lambda: super(Curves, self).finalize(status))

    def _attempt(self, write: Callable[[], object], step: int | None = None) -> None:
        if self._has_stopped:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            # Lightning wraps whatever a writer raises in a ValueError about the value's type.
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            self._stop(cause, step)

    def _stop(self, error: OSError, step: int | None = None) -> None:
        self._has_stopped = True
        since = "" if step is None else f", and end before step {step}"
        log.warning(
            "exp_manager.create_tensorboard_logger: the curves in %s cannot be written%s: %s; training "
            "goes on without them",
            self.log_dir,
            since,
            explain(error),
        )


@contextmanager
def quiet_event_writers() -> Iterator[None]:
    """Within it, a thread of TensorBoard's that cannot write ends without a traceback: ``Curves`` gets its
    error with the next value, and reports it."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        module = type(found.thread).__module__
        if not (isinstance(found.exc_value, OSError) and module.partition(".")[0] == "tensorboard"):
            before(found)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def keep_logging(handlers: Iterable[logging.Handler]) -> None:
    """Have log files that cannot be written say so once, where Python prints a traceback per line."""
    for handler in handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = _FirstFault(handler)  # type: ignore[method-assign]


class _FirstFault:
    def __init__(self, handler: logging.FileHandler) -> None:
        self._handler, self._is_told = handler, False

    def __call__(self, record: logging.LogRecord) -> None:
        if self._is_told:
            return
        self._is_told = True
        error = sys.exc_info()[1]
        reason = explain(error) if isinstance(error, OSError) else str(error)
        log.warning("the log %s cannot be written: %s", self._handler.baseFilename, reason)
