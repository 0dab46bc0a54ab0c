"""Traces of steps, their phases and anomaly detection, of a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_fixture import Project, scalars

from nxdt_align.cli import main
from nxdt_align.config.check import check_notices
from nxdt_align.config.load import load_config
from nxdt_align.config.schema import ProfilerConfig
from nxdt_align.training.profile import ProfileSteps

GIVEN = ("data.val_dir=null", "exp_manager.export_hf=False")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of 7 steps with a profiler of one skipped, one dropped and two kept steps, twice; the second
    cycle is cut short behind its first kept step."""
    project = Project.create(tmp_path_factory.mktemp("profile"))
    profiler = "trainer.profiler={wait: 1, warmup: 1, active: 2, repeat: 2, record_shapes: true}"
    assert project.train("trainer.max_steps=7", profiler, "exp_manager.log_step_phases=True", *GIVEN) == 0
    return project


def test_traces_are_what_perfetto_reads(project: Project) -> None:
    """Chrome's trace format: complete events with name, start and duration, of operators and of the steps."""
    steps = {"rank_0_step_4.json.gz": {2, 3}, "rank_0_step_7.json.gz": {6}}
    files = sorted((project.only_run() / "profile").iterdir())
    assert [file.name for file in files] == list(steps)
    for file in files:
        trace = json.loads(gzip.decompress(file.read_bytes()))
        whole = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
        assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in whole)
        names = {event["name"] for event in whole}
        assert "aten::mm" in names
        # The profiler opens a step's event as the one before ends, so that a cut cycle has one more.
        found = {
            int(name.removeprefix("ProfilerStep#")) for name in names if name.startswith("ProfilerStep#")
        }
        assert found - {7} == steps[file.name]
    said = (project.only_run() / "run.log").read_text()
    assert said.count("trace: ") == 2 and "no trace" not in said


def test_a_run_that_is_too_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After 2 steps nothing is profiled yet, and after 3 nothing is kept; after 4 one step is."""
    caplog.set_level("INFO", logger="nxdt_align")
    none: Any = None
    for steps in (2, 3, 4):
        made = ProfileSteps(ProfilerConfig(), tmp_path, 0, torch.device("cpu"))
        made.on_train_start(none, none)
        for step in range(steps):
            torch.ones(2) + 1
            made.on_train_batch_end(SimpleNamespace(global_step=step + 1))  # type: ignore[arg-type]
        made.on_train_end(none, none)
    whole = "trainer.profiler: no trace, as the run ended after {} steps, within wait + warmup (3)"
    assert caplog.messages[:2] == [whole.format(2), whole.format(3)]
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["rank_0_step_4.json.gz"]
    assert len(caplog.messages) == 3


def test_a_run_that_would_be_too_short_is_told_before(project: Project) -> None:
    def notices(steps: int) -> list[str]:
        overrides = ("trainer.profiler={}", f"trainer.max_steps={steps}")
        return check_notices(load_config(str(project.root / "conf" / "run.yaml"), overrides))

    (notice,) = notices(3)
    assert notice == (
        "trainer.profiler: no trace, as trainer.max_steps (3) is within wait + warmup (2 + 1 steps)"
    )
    assert notices(4) == notices(-1) == []


def test_phases_are_logged(project: Project) -> None:
    run = project.only_run()
    logged = scalars(run)
    for phase in ("data", "forward_backward", "optimizer", "metrics"):
        # Metrics' time is of the step before: the first has none.
        steps = list(range(2 if phase == "metrics" else 1, 8))
        assert [step for step, _ in logged[f"time/{phase}"]] == steps
        assert all(0 < value < 60 for _, value in logged[f"time/{phase}"])
    assert "7 steps of " in (run / "run.log").read_text()
    assert "(waiting for the device at each phase's end)" in (run / "run.log").read_text()


def test_anomalies_are_told(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate that overflows: one message with the step and the function, no traceback."""
    folder = f"exp_manager.explicit_log_dir={tmp_path / 'run'}"
    given = (
        "model.optim.sched=null",
        "model.optim.lr=1e9",
        "trainer.detect_anomaly=True",
        "trainer.max_steps=6",
    )
    assert main(project.arguments(folder, *given, *GIVEN)) == 1
    error = capsys.readouterr().err
    assert "error: trainer.detect_anomaly: step 2: Function '" in error and "returned nan values" in error
    assert "Lower model.optim.lr" in error


def test_faults(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for value, message in (
        ("{active: 0}", "profiler.active: must be at least 1"),
        ("pytorch", "trainer.profiler"),
    ):
        assert main(project.arguments(f"trainer.profiler={value}")) == 1
        assert message in capsys.readouterr().err
