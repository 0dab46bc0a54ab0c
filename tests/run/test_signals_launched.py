"""Signals to a run of several processes, and to one under train.sh, torchrun and Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launched_run import ENDLESS, PATIENCE, launch, wait_for, worker
from train_sh_fixture import write_script
from training_fixture import Project, assert_same_run, scalars, train_sh

from nxdt_align.engines.native.checkpoint import checkpoint_step

TRAINS = "preflight: policy and reference agree"


def step_saved(run: Path) -> int:
    (folder,) = [f for f in (run / "checkpoints").iterdir() if f.name[0] != "."]
    return checkpoint_step(folder) or -1


def stop(launcher: subprocess.Popen[bytes], log: Path, pid: int, number: int) -> str:
    """Send the signal when training has begun; what the run has said when it ended by it."""
    try:
        wait_for(TRAINS, log, [launcher])
        os.kill(pid, number)
        assert launcher.wait(PATIENCE) == 128 + number, log.read_text()[-3000:]
    finally:
        launcher.kill()
        launcher.wait()
    said = log.read_text()
    assert "Traceback" not in said and "ChildFailedError" not in said
    name = signal.Signals(number).name
    (line,) = re.findall(rf"{name}: stopped after step (\d+), which is saved: ", said)
    assert int(line) > 0
    assert said.count("to go on: ") == 1
    return said


def test_two_processes_stop_together(repo: Path, tmp_path: Path) -> None:
    """train.sh alone gets the signal."""
    project, log = Project.create(tmp_path), tmp_path / "log"
    launcher = launch(repo, project, log, *ENDLESS)
    said = stop(launcher, log, launcher.pid, signal.SIGUSR1)
    assert f"after step {step_saved(project.only_run())}, which" in said
    assert "error" not in said
    assert f"CONF_FILE={project.root}/conf/run.yaml {repo}/examples/train.sh trainer.devices=2 " in said


@pytest.mark.full
def test_one_rank_alone_gets_it_and_a_restart_loses_nothing(repo: Path, tmp_path: Path) -> None:
    project, log = Project.create(tmp_path), tmp_path / "log"
    launcher = launch(repo, project, log, *ENDLESS)
    try:
        wait_for(TRAINS, log, [launcher])
        said = stop(launcher, log, worker(tmp_path, rank=1), signal.SIGTERM)
    finally:
        launcher.kill()
    step = step_saved(project.only_run())
    assert f"after step {step}, which" in said
    end = (*ENDLESS, f"trainer.max_steps={step + 2}")
    train_sh(repo, project, *end)
    train_sh(repo, project, *end, f"exp_manager.exp_dir={tmp_path}/whole")
    assert_same_run(project.only_run(), project.only_run("whole"))


@pytest.mark.full
@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_signal_ends_every_process(repo: Path, tmp_path: Path, devices: int) -> None:
    """The ranks sleep in their first step."""
    project, log = Project.create(tmp_path), tmp_path / "log"
    (tmp_path / "sleeper.py").write_text(
        "import time\n"
        "from lightning.pytorch import Callback\n"
        "class Sleeper(Callback):\n"
        "    def on_train_batch_start(self, *_):\n"
        "        print('asleep', flush=True)\n"
        "        time.sleep(600)\n"
    )
    more = ("trainer.callbacks=[sleeper.Sleeper]", f"trainer.devices={devices}")
    launcher = launch(repo, project, log, *ENDLESS, *more)
    try:
        wait_for("asleep", log, [launcher])
        launcher.send_signal(signal.SIGTERM)
        wait_for("a second signal ends at once", log, [launcher])
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.wait(2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(PATIENCE) == 143
    finally:
        launcher.kill()
        launcher.wait()
    assert "Traceback" not in log.read_text()


# Slurm

SRUN = """#!{python}
import json, os, sys
open({calls!r}, "a").write(json.dumps({{"srun": sys.argv[1:], "pid": os.getpid()}}) + "\\n")
os.execvp(sys.argv[2], sys.argv[2:])
"""
SCONTROL = """#!{python}
import json, sys
open({calls!r}, "a").write(json.dumps({{"scontrol": sys.argv[1:]}}) + "\\n")
"""


class Slurm:
    """examples/slurm.sbatch as Slurm would run it on one node; srun and scontrol stand in."""

    def __init__(self, repo: Path, root: Path) -> None:
        self.script, self.repo, self.root = repo / "examples" / "slurm.sbatch", repo, root
        self.calls = root / "calls.jsonl"
        self.calls.touch()
        self.bin = root / "bin"
        self.bin.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            write_script(self.bin / name, text.format(python=sys.executable, calls=str(self.calls)))

    def start(self, log: Path, restarts: int, *overrides: str, **more: str) -> subprocess.Popen[bytes]:
        variables = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_NNODES": "1",
            "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_SUBMIT_DIR": str(self.repo),
            "NXDT_ALIGN_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            **more,
        }
        copy = self.root / "slurm_script"  # in Slurm's own folder
        copy.write_bytes(self.script.read_bytes())
        with log.open("ab") as output:
            return subprocess.Popen(
                ["bash", str(copy), *overrides],
                cwd=self.root,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def made(self, program: str) -> list[dict[str, object]]:
        calls = [json.loads(line) for line in self.calls.read_text().splitlines()]
        return [call for call in calls if program in call]


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, False), (138, True)])
def test_a_job_is_requeued_after_its_warning_alone(
    repo: Path, tmp_path: Path, status: int, requeued: bool
) -> None:
    slurm = Slurm(repo, tmp_path)
    submit = tmp_path / "submit"
    (submit / "examples").mkdir(parents=True)
    write_script(submit / "examples" / "train.sh", f"#!/bin/sh\nexit {status}\n")
    job = slurm.start(tmp_path / "log", 0, "a=b c", SLURM_SUBMIT_DIR=str(submit))
    assert job.wait(PATIENCE) == status
    (call,) = slurm.made("srun")
    keys = ["exp_manager.resume_if_exists=True", "exp_manager.resume_ignore_no_checkpoint=True"]
    assert call["srun"] == ["--kill-on-bad-exit=1", str(submit / "examples" / "train.sh"), *keys, "a=b c"]
    assert [call["scontrol"] for call in slurm.made("scontrol")] == ([["requeue", "77"]] if requeued else [])


def test_the_jobs_directives(repo: Path) -> None:
    lines = (repo / "examples" / "slurm.sbatch").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=USR1@300", "--ntasks-per-node=1"} <= set(directives)
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first for i, line in enumerate(lines) if line.startswith("#SBATCH")), (
        "sbatch reads no others"
    )


@pytest.mark.full
def test_a_requeued_job_resumes_its_run(repo: Path, tmp_path: Path) -> None:
    project, log = Project.create(tmp_path), tmp_path / "log"
    slurm = Slurm(repo, tmp_path)
    config = str(project.root / "conf" / "run.yaml")
    job = slurm.start(log, 0, *ENDLESS, "trainer.devices=1", CONF_FILE=config)
    try:
        wait_for(TRAINS, log, [job])
        (call,) = slurm.made("srun")
        os.kill(int(str(call["pid"])), signal.SIGUSR1)  # as Slurm does to a step's tasks
        assert job.wait(PATIENCE) == 138
    finally:
        job.kill()
        job.wait()
    assert [call["scontrol"] for call in slurm.made("scontrol")] == [["requeue", "77"]]
    step = step_saved(project.only_run())
    end = (*ENDLESS, "trainer.devices=1", f"trainer.max_steps={step + 2}")
    assert slurm.start(log, 1, *end, CONF_FILE=config).wait(PATIENCE) == 0
    assert [at for at, _ in scalars(project.only_run())["lr"]] == list(range(1, step + 3))
    assert "Traceback" not in log.read_text()
