"""Traces of steps, their phases and anomaly detection, of a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from training_fixture import Project, scalars

from nxdt_align.cli import main

GIVEN = ("data.val_dir=null", "exp_manager.export_hf=False")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run with a profiler of one skipped, one dropped and two kept steps, twice, the second cut short."""
    project = Project.create(tmp_path_factory.mktemp("profile"))
    profiler = "trainer.profiler={wait: 1, warmup: 1, active: 2, repeat: 2, record_shapes: true}"
    assert project.train("trainer.max_steps=6", profiler, "exp_manager.log_step_phases=True", *GIVEN) == 0
    return project


def test_traces_are_what_perfetto_reads(project: Project) -> None:
    """Chrome's trace format: complete events with name, start and duration, of operators and of the steps."""
    (first, *more) = sorted((project.only_run() / "profile").iterdir())
    assert first.name == "rank_0_step_4.json.gz" and len(more) <= 1
    trace = json.loads(gzip.decompress(first.read_bytes()))
    whole = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in whole)
    names = {event["name"] for event in whole}
    assert "aten::mm" in names and {name for name in names if name.startswith("ProfilerStep#")} == {
        "ProfilerStep#2",
        "ProfilerStep#3",
    }
    assert "trace: " in (project.only_run() / "run.log").read_text()


def test_phases_are_logged(project: Project) -> None:
    run = project.only_run()
    logged = scalars(run)
    for phase in ("forward_backward", "optimizer"):
        assert len(logged[f"time/{phase}"]) == 6 and all(
            0 < value < 60 for _, value in logged[f"time/{phase}"]
        )
    assert "6 steps of " in (run / "run.log").read_text()
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
