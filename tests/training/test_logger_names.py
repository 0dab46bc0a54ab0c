"""What a run is called in W&B and MLflow: Lightning's own loggers, made as NeMo makes them.

Neither package is installed. W&B's logger needs none before its first value; MLflow's makes a client.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from nxdt_align.config.experiment import ExpManagerConfig
from nxdt_align.training.experiment import logger_settings, name_run

DATED, SWEPT = Path("experiments/run/2026-01-02_03-04-05"), Path("sweeps/run/kl_beta=0.1")
EXPLICIT = ExpManagerConfig(explicit_log_dir=str(SWEPT))


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    tracking = SimpleNamespace(MlflowClient=lambda uri: None)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(tracking=tracking))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)


def wandb(config: ExpManagerConfig, **given: Any) -> tuple[Any, Any, Any]:
    """Name, id and folder of what would be begun; NeMo's folder is exp."""
    config = replace(config, create_wandb_logger=True, wandb_logger_kwargs=given)
    folder, version = (DATED, DATED.name) if config.explicit_log_dir is None else (SWEPT, "")
    chosen = logger_settings(config, "experiment")["wandb_logger_kwargs"]
    logger = WandbLogger(version=version, **{**chosen, "save_dir": chosen.get("save_dir") or "exp"})
    name_run(logger, config, folder)
    begun = logger._wandb_init
    assert (logger.name, logger.version) == (begun["project"], begun["id"])
    return begun["name"], begun["id"], begun["dir"]


def mlflow(config: ExpManagerConfig, **given: Any) -> tuple[Any, Any]:
    """The run's name, where the logger gives one, and its experiment's."""
    config = replace(config, create_mlflow_logger=True, mlflow_logger_kwargs=given)
    folder, version = (DATED, DATED.name) if config.explicit_log_dir is None else (SWEPT, "")
    logger = MLFlowLogger(run_name=version, **logger_settings(config, "experiment")["mlflow_logger_kwargs"])
    name_run(logger, config, folder)
    return logger._run_name, logger._experiment_name


def test_wandb() -> None:
    """Its id is the date, where none is given; an explicit folder's name is the run's."""
    assert wandb(ExpManagerConfig(), project="p") == (None, DATED.name, "exp")
    assert wandb(ExpManagerConfig(), project="p", name="n", id=7, dir="d") == ("n", "7", "d")
    assert wandb(EXPLICIT, project="p") == (SWEPT.name, None, "exp")
    assert wandb(EXPLICIT, name="n", id="mine") == ("n", "mine", "exp")


def test_mlflow() -> None:
    """A name that the tags give stays, which Lightning would replace."""
    assert mlflow(ExpManagerConfig()) == (DATED.name, "experiment")
    assert mlflow(ExpManagerConfig(), experiment_name=None) == (DATED.name, "experiment")
    assert mlflow(EXPLICIT, experiment_name="e") == (SWEPT.name, "e")
    assert mlflow(EXPLICIT, tags={"mlflow.runName": "own"}) == (None, "experiment")


def test_loggers_that_are_off_get_nothing() -> None:
    assert logger_settings(ExpManagerConfig(), "experiment") == {
        "wandb_logger_kwargs": None,
        "mlflow_logger_kwargs": {},
    }
