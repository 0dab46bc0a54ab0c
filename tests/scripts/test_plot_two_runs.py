"""scripts/plot_two_runs.py, on event files as training writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


def write_log(folder: Path, losses: dict[int, float]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for step, loss in losses.items():
            writer.add_scalar("reduced_train_loss", loss, step)


def plot(repo: Path, fonts: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "scripts" / "plot_two_runs.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=fonts)


def test_a_resumed_run_beside_another(repo: Path, tmp_path: Path, fonts: dict[str, str]) -> None:
    write_log(tmp_path / "a" / "first", {1: 0.5, 2: 0.25})
    write_log(tmp_path / "a" / "resumed", {3: 0.125})
    write_log(tmp_path / "b", {1: 0.5, 2: 0.5, 3: 0.125, 4: 0.0})
    picture = tmp_path / "new" / "two.png"
    done = plot(repo, fonts, tmp_path / "a", tmp_path / "b", "--out", picture)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{picture}: 3 steps, largest difference 2.5e-01\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_folder_without_a_log_is_one_message(repo: Path, tmp_path: Path, fonts: dict[str, str]) -> None:
    write_log(tmp_path / "a", {1: 0.5})
    done = plot(repo, fonts, tmp_path / "a", tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'none'} holds no TensorBoard log with reduced_train_loss\n"
