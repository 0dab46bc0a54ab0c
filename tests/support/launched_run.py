"""A run in processes of its own, under train.sh or alone, until a test ends it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from training_fixture import Project

ENDLESS = (
    *(
        "trainer.devices=2",
        "trainer.max_steps=1000000",
        "trainer.max_epochs=-1",
        "trainer.limit_val_batches=0",
    ),
    *("exp_manager.checkpoint_callback_params.every_n_train_steps=1000000", "exp_manager.export_hf=False"),
)
PATIENCE = 600
"""Seconds: what a loaded machine may take. Nothing here takes as long as it may."""


def wait_for(text: str, file: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while text not in file.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in time:\n{file.read_text()[-3000:]}"
        assert all(p.poll() is None for p in processes), file.read_text()[-3000:]
        time.sleep(0.1)


def environment(**more: str) -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "PYTHONUNBUFFERED": "1", **more}


def launch(repo: Path, project: Project, log: Path, *overrides: str, **more: str) -> subprocess.Popen[bytes]:
    """train.sh with the project's YAML, in the project's folder."""
    variables = environment(
        NXDT_ALIGN_PYTHON=sys.executable,
        CONF_FILE=str(project.root / "conf" / "run.yaml"),
        LOG_PATH=str(project.root / "logs"),
        **more,
    )
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(repo / "examples" / "train.sh"), *overrides],
            cwd=project.root,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def worker(folder: Path, rank: int) -> int:
    """The process of this run that has ``rank``; found among all by the run's own folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            variables = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        is_trainer = f"--config-path\0{folder}/conf" in command and "\0workers\0" not in command
        if is_trainer and f"RANK={rank}" in variables:
            return int(process.name)
    raise AssertionError(f"no process of rank {rank}")
