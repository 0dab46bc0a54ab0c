"""Calls NeMo's exp_manager with NxDT's settings: folder, loggers, checkpoint callback, log files."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf.errors import OmegaConfBaseException

from nxdt_align.config.experiment import ExpManagerConfig
from nxdt_align.config.start import EVENT_FILES, METRICS_FILE, SAMPLES_FILE
from nxdt_align.errors import UserError
from nxdt_align.messages import LOG_FILE
from nxdt_align.training.curves import Curves, keep_logging
from nxdt_align.training.metrics_file import MetricsFile
from nxdt_align.training.stopping import StopOnSignal

MLFLOW_NAME = "mlflow.runName"
"""MLflow's tag of a run's name."""


def start_experiment(
    trainer: Trainer, config: ExpManagerConfig, name: str, folder: Path, *, resumed_step: int | None
) -> Path:
    """Set up the trainer's loggers and callbacks from ``config``, the YAML's ``exp_manager``.

    Args:
        name: the experiment's, where its loggers' settings have none.
        folder: the run's. Not left to NeMo, which only finds checkpoints named '*last' or '*end' and so
            starts over with the ``save_last: False`` of NxDT's YAML.
        resumed_step: optimizer steps of the checkpoint that this run resumes from; None for a new run.

    Returns the run's output folder.
    """
    # These imports take seconds: only a training run pays for them.
    from nemo.utils import exp_manager as nemo
    from nemo.utils import logging as nemo_logging
    from nemo.utils.exceptions import NeMoBaseException

    chosen = nemo_settings(config, nemo) | logger_settings(config, name)
    if config.explicit_log_dir is not None:
        chosen |= {"explicit_log_dir": str(folder), "exp_dir": None, "version": None}
    else:
        chosen |= {
            "exp_dir": str(folder.parent.parent),
            "name": folder.parent.name,
            "version": folder.name,
        }
    if resumed_step is not None:
        # Steps after the checkpoint are logged again: purge_step makes TensorBoard drop the first copy.
        chosen["summary_writer_kwargs"] = {
            **(config.summary_writer_kwargs or {}),
            "purge_step": resumed_step + 1,
        }
    before = set(folder.glob("run_*"))
    nemo_logging.setLevel(nemo_logging.WARNING)
    logging.getLogger("nemo_logger").addFilter(_is_news)
    try:
        nemo.exp_manager(trainer, chosen)
    except (ValueError, TypeError, ImportError, NeMoBaseException, OmegaConfBaseException) as error:
        # NeMo's checks of its own settings, loggers that refuse theirs or whose package does not import.
        raise UserError(f"exp_manager: {' '.join(str(error).split())}") from error
    finally:
        logging.getLogger("nemo_logger").removeFilter(_is_news)
    nemo_logging.setLevel(nemo_logging.INFO)
    trainer.loggers = [_that_may_stop(each, chosen["summary_writer_kwargs"]) for each in trainer.loggers]
    for logger in trainer.loggers:
        name_run(logger, config, folder)
    for name in ("nemo_logger", "lightning.pytorch"):
        keep_logging(logging.getLogger(name).handlers)
    _write_checkpoints(trainer)
    _keep_events_in_place(folder, before)
    if trainer.is_global_zero:
        _remove_marks(trainer)
        trainer.loggers = [*trainer.loggers, MetricsFile(folder, resumed_step)]
    return folder


def _is_news(record: logging.LogRecord) -> bool:
    """False of NeMo's warning that an explicit_log_dir exists: the run has made it, or resumes in it."""
    return "but it already exists" not in record.getMessage()


def _that_may_stop(logger: Logger, settings: Mapping[str, Any] | None) -> Logger:
    if not isinstance(logger, TensorBoardLogger):
        return logger
    return Curves(logger.save_dir, name=logger.name, version=logger.version, **(settings or {}))


def logger_settings(config: ExpManagerConfig, name: str) -> dict[str, Any]:
    """Arguments of W&B's and MLflow's loggers, with what NeMo would leave out: W&B's ``dir``, which it sets
    beside, and, with an explicit_log_dir, MLflow's experiment."""
    wandb, mlflow = config.wandb_logger_kwargs, config.mlflow_logger_kwargs
    if wandb is not None and wandb.get("save_dir") is None and wandb.get("dir") is not None:
        wandb = {**wandb, "save_dir": wandb["dir"]}
    if config.create_mlflow_logger and not mlflow.get("experiment_name"):
        mlflow = {**mlflow, "experiment_name": name}
    return {"wandb_logger_kwargs": wandb, "mlflow_logger_kwargs": mlflow}


def name_run(logger: Logger, config: ExpManagerConfig, folder: Path) -> None:
    """Give a run of W&B or MLflow the name or id that the settings have, and else tell it by its folder.

    NeMo hands both loggers the date, which they take before what is given, and nothing for an
    explicit_log_dir, with which a sweep's runs would all be called alike, or at random.
    """
    if isinstance(logger, WandbLogger):
        given = config.wandb_logger_kwargs or {}
        if given.get("id") is not None:
            logger._id = logger._wandb_init["id"] = str(given["id"])
        if config.explicit_log_dir is not None and not given.get("name"):
            logger._name = logger._wandb_init["name"] = folder.name
    elif isinstance(logger, MLFlowLogger):
        if MLFLOW_NAME in (config.mlflow_logger_kwargs.get("tags") or {}):
            logger._run_name = None
        else:
            logger._run_name = logger._run_name or folder.name


def nemo_settings(config: ExpManagerConfig, nemo: Any) -> dict[str, Any]:
    """``config`` as the module ``nemo`` takes it, without the run's folder."""
    settings = dataclasses.asdict(config)
    known = {field.name for field in dataclasses.fields(nemo.ExpManagerConfig)}
    chosen = {name: value for name, value in settings.items() if name in known}
    chosen["checkpoint_callback_params"] = _callback_params(settings["checkpoint_callback_params"], nemo)
    # find_run decides; NeMo must neither search nor move checkpoints.
    chosen["resume_if_exists"] = False
    chosen["resume_from_checkpoint"] = None  # trainer.fit is given it
    chosen["create_preemption_callback"] = False  # StopOnSignal does more, without CUDA
    return chosen


def _write_checkpoints(trainer: Trainer) -> None:
    from nxdt_align.training.checkpoints import RunCheckpoint  # imports NeMo

    checkpoint = RunCheckpoint.adopt(trainer)
    if checkpoint is None:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopOnSignal):
            callback.save_with(checkpoint)


def _callback_params(settings: Mapping[str, Any], nemo: Any) -> dict[str, Any]:
    """NxDT's checkpoint settings in NeMo's terms."""
    known = {field.name for field in dataclasses.fields(nemo.CallbackParams)}
    params = {name: value for name, value in settings.items() if name in known}
    params["save_nemo_on_train_end"] = False
    if params.get("every_n_train_steps") is not None or params.get("train_time_interval") is not None:
        # Lightning's ModelCheckpoint accepts only one of the three, and NeMo's default would be a second.
        params["every_n_epochs"] = None
    return params


def _remove_marks(trainer: Trainer) -> None:
    """Remove NeMo's markers of unfinished checkpoints, whose checkpoints NeMo deletes at the next start. Ours
    are atomic, and a killed run may have left a marker on its only good one."""
    callback: Any = trainer.checkpoint_callback
    if callback is not None:
        for mark in Path(callback.dirpath).glob(f"*{callback.UNFINISHED_CHECKPOINT_SUFFIX}"):
            mark.unlink(missing_ok=True)


def _keep_events_in_place(folder: Path, before: set[Path]) -> None:
    """Move TensorBoard files and our log back from run_N, where NeMo puts a resumed run's earlier files, so
    that the run stays one curve."""
    for moved in set(folder.glob("run_*")) - before:
        for name in (EVENT_FILES, LOG_FILE, METRICS_FILE, SAMPLES_FILE):
            for file in moved.glob(name):
                shutil.move(str(file), str(folder / file.name))
