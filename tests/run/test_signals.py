"""Signals: the step is finished and saved, the exit status says which came, and a restart loses nothing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_fixture import Project, assert_same_run, scalars

from nxdt_align.cli import main
from nxdt_align.engines.native.checkpoint import checkpoint_step
from nxdt_align.stop_signals import Stopped, StopSignals
from nxdt_align.training.hooks import ReferencePass
from nxdt_align.training.module import AlignmentModule
from nxdt_align.training.strategy import EngineStrategy

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CALLBACK = "exp_manager.checkpoint_callback_params"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    import nemo.utils.exp_manager  # noqa: F401 (its log handlers keep stderr, which no test may have replaced)

    return Project.create(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project: Project) -> Path:
    """A run of 8 steps that nothing interrupted: epochs of 6 steps, validation at 3 and 6, saves at 2, ..."""
    assert project.train(f"exp_manager.exp_dir={project.root}/whole") == 0
    return project.only_run("whole")


def steps_saved(run: Path) -> list[int | None]:
    return sorted(checkpoint_step(f) or -1 for f in (run / "checkpoints").iterdir() if f.name[0] != ".")


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def once(number: int) -> Callable[[], None]:
    """Sends the signal at its first call alone: another one would end these tests' process."""
    left = [number]
    return lambda: send(left.pop()) if left else None


Patch = Callable[[pytest.MonkeyPatch, int], None]


def in_step(step: int) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        original = AlignmentModule._log_step

        def log_step(module: AlignmentModule, *arguments: Any) -> None:
            original(module, *arguments)
            if module.global_step == step:
                send(number)

        monkeypatch.setattr(AlignmentModule, "_log_step", log_step)

    return patch


def in_validation(step: int, batch: int) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        original = AlignmentModule.validation_step

        def validate(module: AlignmentModule, micro_batches: Any, batch_idx: int) -> None:
            original(module, micro_batches, batch_idx)
            if module.global_step == step and batch_idx == batch:
                send(number)

        monkeypatch.setattr(AlignmentModule, "validation_step", validate)

    return patch


def in_save(step: int) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        original, first = EngineStrategy.save_checkpoint, once(number)

        def save(strategy: EngineStrategy, checkpoint: dict[str, Any], *arguments: Any, **more: Any) -> None:
            if checkpoint["global_step"] == step:
                first()
            original(strategy, checkpoint, *arguments, **more)

        monkeypatch.setattr(EngineStrategy, "save_checkpoint", save)

    return patch


MOMENTS: dict[str, tuple[Patch, int]] = {
    "step before validation": (in_step(3), 3),
    "save": (in_save(2), 2),
    "validation at the epoch's end": (in_validation(6, 0), 6),
    "first step": (in_step(1), 1),
    "step": (in_step(5), 5),
    "step of a save": (in_step(4), 4),
    "epoch's last step": (in_step(6), 6),
    "save before validation": (in_save(6), 6),
    "validation": (in_validation(3, 0), 3),
    "validation's last batch": (in_validation(3, 1), 3),
}
"""Name -> where the signal comes, and the step that is saved."""
SHORT = 3
"""Of them, those of the usual tests."""


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=[pytest.mark.full] if i >= SHORT else []) for i, m in enumerate(MOMENTS)],
)
def test_a_restart_loses_nothing(
    project: Project,
    whole: Path,
    tmp_path: Path,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    patch, step = MOMENTS[moment]
    number = SIGNALS[step % 3]
    where = f"exp_manager.exp_dir={project.root}/{moment.replace(' ', '_')}"
    with monkeypatch.context() as patched:
        patch(patched, number)
        assert project.train(where) == 128 + number
    (run,) = (project.root / moment.replace(" ", "_") / "run").glob("20*")
    assert steps_saved(run) == [step]
    said = capfd.readouterr().err.splitlines()
    name = number.name
    assert (
        f"{name}: stopped after step {step}, which is saved: {run}/checkpoints/run--step={step}-"
        in "\n".join(said)
    )
    assert any(line.startswith("to go on: nxdt-align train --config-path ") for line in said)
    assert not any("Traceback" in line for line in said)
    assert signal.getsignal(number) == (
        signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    )
    assert project.train(where) == 0
    assert_same_run(run, whole)
    shutil.rmtree(run.parent)


def test_a_checkpoint_in_the_background_is_awaited(
    project: Project, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run, though it has not come to its end, leaves its report and the shares of its steps."""
    where = (f"exp_manager.exp_dir={tmp_path}", "exp_manager.async_checkpointing=True")
    with monkeypatch.context() as patched:
        in_save(4)(patched, signal.SIGTERM)
        assert project.train(*where, "exp_manager.report=True") == 143
    (run,) = (tmp_path / "run").glob("20*")
    assert steps_saved(run) == [4]
    (reported,) = json.loads((run / "report.json").read_text())["runs"]
    assert reported["steps"] == 4
    assert "INFO: 4 steps of " in (run / "run.log").read_text()
    assert project.train(*where) == 0
    assert_same_run(run, whole)


def test_in_the_data_nothing_is_there_to_save(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nxdt_align.run.run.row_reports", lambda *_: send(signal.SIGUSR1))
    assert project.train(f"exp_manager.exp_dir={tmp_path}") == 138
    assert "SIGUSR1: stopped before the first step: there is nothing to save yet\n" in capfd.readouterr().err
    assert not list(tmp_path.rglob("checkpoints"))


def test_in_the_reference_pass_finished_values_are_kept(
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    where = f"exp_manager.exp_dir={tmp_path}"
    original = ReferencePass._run

    def run(self: ReferencePass, split: Any, **how: Any) -> None:
        original(self, split, **how)
        send(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(ReferencePass, "_run", run)
        assert project.train(where) == 143
    said = capfd.readouterr().err
    assert (
        "stopped before the first step: there is nothing to save yet, and finished reference values are kept"
        in said
    )
    caplog.clear()
    assert project.train(where, "trainer.max_steps=1") == 0
    assert any("22 records, 0 computed, 22 from the store" in m for m in caplog.messages)


def test_in_the_export(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    where = (f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=3")
    with monkeypatch.context() as patched:
        patched.setattr("nxdt_align.run.run.write_hf_folder", lambda *_, **__: send(signal.SIGINT))
        assert project.train(*where) == 130
    (run,) = (tmp_path / "run").glob("20*")
    assert steps_saved(run) == [3] and not (run / "hf_export").exists()
    assert "SIGINT: the last step, 3, is saved, but the export is not\n" in capfd.readouterr().err
    assert project.train(*where) == 0
    assert (run / "hf_export" / "model.safetensors").exists()


def test_at_the_last_step_what_is_due_is_done_first(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation of the last step would else never be run: a run without steps left does not validate."""
    where = (f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=3")
    with monkeypatch.context() as patched:
        in_step(3)(patched, signal.SIGTERM)
        assert project.train(*where) == 143
    (run,) = (tmp_path / "run").glob("20*")
    assert steps_saved(run) == [3] and not (run / "hf_export").exists()
    assert [step for step, _ in scalars(run)["val_loss"]] == [3]


def test_the_command_resumes_where_the_yaml_would_not(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    where = (f"exp_manager.exp_dir={tmp_path}", "exp_manager.resume_if_exists=False")
    with monkeypatch.context() as patched:
        in_step(2)(patched, signal.SIGTERM)
        assert project.train(*where) == 143
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("to go on: ")]
    assert line.endswith(" exp_manager.resume_if_exists=False exp_manager.resume_if_exists=True")
    assert main(shlex.split(line.removeprefix("to go on: nxdt-align "))) == 0
    (run,) = (tmp_path / "run").glob("20*")
    assert [step for step, _ in scalars(run)["lr"]] == list(range(1, 9))


def test_before_anything_is_imported(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nxdt_align.cli_process.lacked_variables", lambda *_: send(signal.SIGTERM))
    assert project.train(f"exp_manager.exp_dir={tmp_path}") == 143
    said = capfd.readouterr().err
    assert said.endswith("SIGTERM: stopped before the first step: there is nothing to save yet\n")


def test_without_the_preemption_callback_signals_have_their_usual_effect(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    found = []
    monkeypatch.setattr(
        AlignmentModule, "_log_step", lambda *_: found.extend(signal.getsignal(n) for n in SIGNALS)
    )
    try:
        key = "exp_manager.create_preemption_callback=False"
        assert project.train(f"exp_manager.exp_dir={tmp_path}", key, "trainer.max_steps=1") == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert found == [signal.SIG_DFL] * 3


SLOW = """
import os, signal, sys, time
from nxdt_align.cli import main
from nxdt_align.training.module import AlignmentModule
def slow(module, *arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
AlignmentModule._log_step = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_a_second_signal_ends_at_once(project: Project, tmp_path: Path, repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLOW, *project.arguments(f"exp_manager.exp_dir={tmp_path}")],
        env={**os.environ, "PYTHONPATH": str(repo / "src")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 143
    *_, first, second = done.stderr.splitlines()
    assert first == "SIGTERM: finishing the step and writing a checkpoint; a second signal ends at once"
    assert second == "SIGTERM: received again; what was not saved is lost"
    assert not list(tmp_path.rglob("checkpoint.json"))


def test_a_run_whose_main_thread_hears_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code that waits lets no handler run; here it is a handler that is not the interpreter's."""
    ended = threading.Event()
    status: list[int] = []
    monkeypatch.setattr("nxdt_align.stop_signals.UNHEARD_SECONDS", 0.1)
    monkeypatch.setattr("os._exit", lambda code: (status.append(code), ended.set()))
    with StopSignals():
        signal.signal(signal.SIGTERM, lambda *_: None)
        send(signal.SIGTERM)
        assert ended.wait(300)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert set(status) == {143}


def test_what_a_launcher_repeats_is_one_signal() -> None:
    with StopSignals(repeats=float("inf")) as signals:
        signals.hold()
        for _ in range(3):
            send(signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        with pytest.raises(Stopped, match="138"):
            signals.release()
