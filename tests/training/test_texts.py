"""A run's settings, layout and texts in its loggers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_fixture import Project, scalars

from nxdt_align.training.texts import write_settings, write_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = Project.create(tmp_path_factory.mktemp("texts"))
    assert project.train("trainer.max_steps=3", "exp_manager.export_hf=False") == 0
    return project.only_run()


def test_tensorboard_has_settings_yaml_and_layout(run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    shown = text.removeprefix("```yaml\n").removesuffix("```")
    assert yaml.safe_load(shown) == yaml.safe_load((run / "config.yaml").read_text())
    plugins = events.PluginTagToContent("hparams")
    assert set(plugins) == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    assert "hp_metric" not in scalars(run), "settings add no curve"
    start = plugins["_hparams_/session_start_info"]
    assert b"model_alignment_strategy.dpo.kl_beta" in start and b"zero1" not in start, "what is given alone"
    (layout,) = events.Tensors("custom_scalars__config__")
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    found = Layout.FromString(layout.tensor_proto.string_val[0])
    charts = found.category[0].chart
    assert [chart.title for chart in charts][:4] == [
        *("loss", "reward accuracy", "reward margin", "log-probability of chosen and rejected responses"),
    ]
    logged = set(scalars(run))
    shown = {tag for chart in charts for tag in chart.multiline.tag}
    assert {"reduced_train_loss", "val_loss", "rewards/accuracies", "rewards/margins"} <= shown <= logged


class Recorded(Logger):
    """Of a class's name, without its package."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    name = version = "x"

    def log_metrics(self, *arguments: Any, **settings: Any) -> None: ...

    def log_hyperparams(self, *arguments: Any, **settings: Any) -> None:
        self.calls.append(("log_hyperparams", arguments[0]))


class Wandb(Recorded, WandbLogger):
    def log_table(self, key: str, **given: Any) -> None:  # type: ignore[override]
        self.calls.append((key, given))


class MLFlow(Recorded, MLFlowLogger):
    run_id = "7"
    params: ClassVar[dict[str, str]] = {}
    """What the run has on the server."""

    @property
    def experiment(self) -> Any:
        return self

    def get_run(self, run_id: str) -> Any:
        assert run_id == "7"
        return SimpleNamespace(data=SimpleNamespace(params=self.params))

    def log_text(self, run_id: str, text: str, file: str) -> None:
        self.calls.append((file, text))


def test_every_logger_has_the_settings() -> None:
    """W&B and MLflow as Lightning calls them, all of the settings; MLflow the YAML as a file too."""
    wandb, mlflow = Wandb(), MLFlow()
    write_settings([wandb, mlflow], {"a.b": 1, "c": None}, {"a.b": 1}, "a: {b: 1}\n")
    assert wandb.calls == [("log_hyperparams", {"a.b": 1, "c": None})]
    assert mlflow.calls == [*wandb.calls, ("config_0.md", "```yaml\na: {b: 1}\n```")]


def test_settings_of_an_mlflow_run_that_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """MLflow refuses another value of a setting; Lightning hands it 250 characters of each."""
    mlflow = MLFlow()
    mlflow.params = {"a.b": "1", "c": "None", "long": "x" * 250}  # type: ignore[misc]
    write_settings([mlflow], {"a.b": 2, "c": None, "new": 3, "long": "x" * 300}, {}, "a: {b: 2}\n")
    assert mlflow.calls[0] == ("log_hyperparams", {"new": 3})
    (said,) = caplog.messages
    assert said == (
        "MLflow's run 7 keeps the values that it began with of settings that have changed: a.b (1); "
        "its config_0.md has this run's"
    )


def test_tables() -> None:
    wandb, mlflow = Wandb(), MLFlow()
    write_table([wandb, mlflow], "samples", ("prompt", "now"), [("a|b", "one\ntwo")], 5)
    assert wandb.calls == [
        ("samples", {"columns": ["prompt", "now"], "data": [["a|b", "one\ntwo"]], "step": 5})
    ]
    assert mlflow.calls == [("samples_5.md", "| prompt | now |\n| --- | --- |\n| a\\|b | one<br>two |")]
