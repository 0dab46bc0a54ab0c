"""The progress line: what fits, most wanted first, on a terminal of any width and without one."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_fixture import Project

from nxdt_align.messages import NOTICE, RunLog
from nxdt_align.training import progress
from nxdt_align.training.progress import RunProgress

METRICS = {
    "reduced_train_loss": 0.51234,
    "rewards/accuracies": 0.75,
    "rewards/margins": 1.25,
    "throughput": 123.45,
    "val_loss": 0.6,
    "lr": 5e-7,
    "gradient_norm": 2.5,
    "rewards/chosen": -1.0,
    "rewards/rejected": -2.25,
}
WANTED = ("step 1234/20000", "loss 0.512", "acc 0.75", "margin 1.25", "123.5 pairs/s")


def trainer(step: int, **metrics: float) -> Any:
    return SimpleNamespace(global_step=step, callback_metrics={**METRICS, **metrics}, sanity_checking=False)


@pytest.mark.parametrize(
    ("columns", "also"), [(80, ()), (100, ("val loss 0.600",)), (200, ("rejected -2.25",))]
)
def test_one_line_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    columns: int,
    also: tuple[str, ...],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    shown = RunProgress(20_000, "pairs", 1, is_terminal=True)
    shown.on_train_start(trainer(1200), None)  # type: ignore[arg-type]
    for step in (1233, 1234):
        shown.on_train_batch_end(trainer(step), None, None, None, 0)  # type: ignore[arg-type]
    shown.on_train_end(trainer(1234), None)  # type: ignore[arg-type]
    lines = re.split("[\r\n]", capsys.readouterr().err)
    assert max(map(len, lines)) <= columns
    last = [line for line in lines if line.strip()][-1]
    assert all(word in last for word in (*WANTED, *also)), last
    assert re.search(r"\|.*\| (\d+:)?\d\d:\d\d$", last), "time left"


def test_lines_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """Of every k-th step, k a step at which metrics are new, and of the last one."""
    caplog.set_level(logging.INFO)
    shown = RunProgress(1003, "pairs", 3, is_terminal=False)
    shown.on_train_start(trainer(0), None)  # type: ignore[arg-type]
    for step in range(1, 1004):
        shown.on_train_batch_end(trainer(step), None, None, None, 0)  # type: ignore[arg-type]
    steps = [int(re.match(r"step (\d+)/1003: loss 0.512", line)[1]) for line in caplog.messages]  # type: ignore[index]
    assert steps == [*range(21, 1003, 21), 1003]
    assert len(steps) <= progress.LINES
    assert {record.levelno for record in caplog.records} == {NOTICE}
    assert caplog.messages[0].endswith(" left") and not caplog.messages[-1].endswith(" left")


def test_lines_where_time_ends_a_run(caplog: pytest.LogCaptureFixture) -> None:
    """10,000 seconds, a step and a validation in each: a line at the first logged step of each fiftieth. The
    file gets each validation. A limit of 1,000 steps comes first: parts of 20 of them."""
    caplog.set_level(logging.INFO)
    now = [0.0]
    for steps, part in ((-1, 200), (1000, 20)):
        caplog.clear()
        shown = RunProgress(steps, "pairs", 3, seconds=1e4, is_terminal=False, clock=lambda: now[0])
        now[0] = 0.0
        shown.on_train_start(trainer(0), None)  # type: ignore[arg-type]
        for step in range(1, 50 * part + 1):
            now[0] += 1.0
            shown.on_train_batch_end(trainer(step), None, None, None, 0)  # type: ignore[arg-type]
            shown.on_validation_end(trainer(step), None)  # type: ignore[arg-type]
        of_steps = [int(found[1]) for line in caplog.messages if (found := re.match(r"step (\d+)", line))]
        wanted = [-(-part * k // 3) * 3 for k in range(1, 50)]
        assert of_steps == wanted + ([1000] if steps > 0 else [])
        of_validations = [r for r in caplog.records if r.getMessage().startswith("validation at step ")]
        assert len(of_validations) == 50 * part
        told = [r for r in of_validations if r.levelno == NOTICE]
        assert 49 <= len(told) <= progress.LINES + 1 and told[0] is of_validations[0]
        assert (told[-1] is of_validations[-1]) or steps < 0


def test_validations_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """At every one of 1,003 steps: the first of each part of 21 steps, and the last."""
    caplog.set_level(NOTICE)
    shown = RunProgress(1003, "pairs", 3, is_terminal=False)
    shown.on_train_start(trainer(0), None)  # type: ignore[arg-type]
    for step in range(1, 1004):
        shown.on_validation_end(trainer(step), None)  # type: ignore[arg-type]
    steps = [int(re.match(r"validation at step (\d+): ", line)[1]) for line in caplog.messages]  # type: ignore[index]
    assert steps == [1, *range(21, 1003, 21), 1003]


def test_metrics_are_read_where_they_are_new(caplog: pytest.LogCaptureFixture) -> None:
    """They may lie on a device, which a step that is not logged must not wait for."""
    read = []

    class OnDevice:
        def __float__(self) -> float:
            read.append(step)
            return 1.0

    shown = RunProgress(12, "pairs", 4, is_terminal=True)
    shown.on_train_start(trainer(0), None)  # type: ignore[arg-type]
    for step in range(1, 13):
        values = trainer(step, reduced_train_loss=OnDevice())  # type: ignore[arg-type]
        shown.on_train_batch_end(values, None, None, None, 0)  # type: ignore[arg-type]
    shown.on_train_end(trainer(12), None)  # type: ignore[arg-type]
    assert read == [4, 8, 12]


def test_what_a_run_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three lines before the first step, each thing once; the rest in the run's file."""
    project = Project.create(tmp_path)
    start = "exp_manager.resume_from_checkpoint"
    assert project.train("trainer.max_steps=1") == 0
    capfd.readouterr()
    export, shown = project.only_run() / "hf_export", "trainer.enable_progress_bar=True"
    limits: list[float | None] = []

    class Told(RunProgress):
        def __init__(self, *arguments: Any, seconds: float | None, **settings: Any) -> None:
            limits.append(seconds)
            super().__init__(*arguments, seconds=seconds, **settings)

    monkeypatch.setattr("nxdt_align.run.run.RunProgress", Told)
    time = "trainer.max_time='01:02:03:04'"
    assert project.train(f"{start}={export}", f"exp_manager.exp_dir={tmp_path}/second", shown, time) == 0
    assert limits == [93_784], "a day, 2 hours, 3 minutes and 4 seconds"
    said = capfd.readouterr().err.splitlines()
    first = next(number for number, line in enumerate(said) if line.startswith("step 1/8: loss"))
    assert [line.split(":")[0].split(",")[0] for line in said[:first]] == ["data", "a new run", "preflight"]
    assert sum(line.startswith("validation at step ") for line in said) == 2
    assert not any("\r" in line or "TPU available" in line for line in said)
    (run,) = project.runs("second")
    kept = (run / "run.log").read_text()
    assert all(line in kept for line in said if line.startswith(("step", "data", "a new run", "validation")))
    for detail in ("TPU available", "busiest rank", "reference log-probs of train: 22 records"):
        assert detail in kept


def test_a_log_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "run.log").symlink_to(full)
    with RunLog(keeps=True) as run_log:
        run_log.write_to(tmp_path)
        for _ in range(2):
            logging.getLogger("nxdt_align").warning("a message")
    assert capsys.readouterr().err.count("run.log cannot be written: [Errno 28] No space left") == 1


def test_a_log_tells_why_a_run_stopped(tmp_path: Path) -> None:
    with pytest.raises(ValueError), RunLog(keeps=True) as run_log:
        logging.getLogger("nxdt_align.anywhere").warning("said before the run has a folder")
        run_log.write_to(tmp_path)
        raise ValueError("data.train_dir: is empty")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING: said before the run has a folder",
        "ERROR: stopped: data.train_dir: is empty",
    ]
