"""async_checkpointing: training goes on while a checkpoint is written, and nothing whole is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_fixture import Project, assert_same_run

from nxdt_align.engines.native import saving
from nxdt_align.engines.native.checkpoint import checkpoint_step

ASYNC = "exp_manager.async_checkpointing=True"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.create(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project: Project) -> Path:
    """A run of 8 steps that writes its checkpoints at once."""
    assert project.train(f"exp_manager.exp_dir={project.root}/whole") == 0
    return project.only_run("whole")


def checkpoints(run: Path) -> list[tuple[int | None, str]]:
    return sorted(
        (checkpoint_step(f), f.name)
        for f in (run / "checkpoints").iterdir()
        if f.is_dir() and f.name[0] != "."
    )


def test_the_run_is_the_same(project: Project, whole: Path) -> None:
    where = f"exp_manager.exp_dir={project.root}/same"
    for steps in (5, 8):
        assert project.train(where, ASYNC, f"trainer.max_steps={steps}") == 0
    run = project.only_run("same")
    assert_same_run(run, whole)
    assert [step for step, _ in checkpoints(run)] == [8]


KILLED = """
import sys, threading
from nxdt_align.cli import main
from nxdt_align.engines.native import saving
from nxdt_align.training.module import AlignmentModule
summary, log_step = saving._summary, AlignmentModule._log_step
begun = threading.Event()
def slow(folder, content):
    if content.step == 4:
        begun.set()
        threading.Event().wait()
    return summary(folder, content)
def told(module, *arguments):
    log_step(module, *arguments)
    if module.global_step == 6:
        assert begun.wait(300)
    print("trained", module.global_step, flush=True)
saving._summary, AlignmentModule._log_step = slow, told
main(sys.argv[1:])
"""


def test_killed_while_one_is_written(project: Project, whole: Path, repo: Path) -> None:
    """Steps 5 and 6 are trained while the checkpoint of step 4 is not whole; that of step 2 outlives it."""
    where = f"exp_manager.exp_dir={project.root}/killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *project.arguments(where, ASYNC)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo / "src")},
    )
    assert process.stdout is not None
    assert any(line == "trained 6\n" for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = project.only_run("killed")
    ((step, name),) = checkpoints(run)
    assert step == 2
    (half,) = (run / "checkpoints").glob(".*.nxdt-tmp")
    shutil.rmtree(half)  # the next write would, once it is a minute old
    # As if it had been killed in the moment in which NeMo marks the checkpoint that is to go.
    (run / "checkpoints" / f"{name}-unfinished").touch()
    assert project.train(where, ASYNC) == 0
    assert [step for step, _ in checkpoints(run)] == [8]
    assert_same_run(run, whole)


@pytest.mark.parametrize(("failing", "left"), [(4, 2), (8, 6)], ids=["in training", "at the end"])
def test_a_full_disk(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: int,
    left: int,
) -> None:
    summary = saving._summary

    def full(folder: Path, content: Any) -> dict[str, Any]:
        if content.step == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return summary(folder, content)

    monkeypatch.setattr(saving, "_summary", full)
    assert project.train(f"exp_manager.exp_dir={project.root}/full-{failing}", ASYNC) == 1
    shown = capsys.readouterr().err
    assert f"step={failing}" in shown and "the disk is full" in shown
    assert "it was being written in the background" in shown
    assert [step for step, _ in checkpoints(project.only_run(f"full-{failing}"))] == [left]
