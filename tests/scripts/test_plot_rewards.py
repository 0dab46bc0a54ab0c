"""scripts/plot_rewards.py, on an event file as training writes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

TAGS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")


def write_log(folder: Path, tags: tuple[str, ...] = TAGS) -> None:
    with SummaryWriter(str(folder)) as writer:
        for step in range(1, 4):
            for tag in tags:
                writer.add_scalar(tag, 0.25 * step, step)


def plot(repo: Path, fonts: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "scripts" / "plot_rewards.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=fonts)


def test_draws_a_picture(repo: Path, tmp_path: Path, fonts: dict[str, str]) -> None:
    write_log(tmp_path / "run")
    done = plot(repo, fonts, tmp_path / "run", "--out", tmp_path / "new" / "rewards.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "new" / "rewards.png").read_bytes().startswith(b"\x89PNG")


def test_picture_shows_the_logged_values(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "scripts"))
    import plot_rewards

    write_log(tmp_path)
    curves = plot_rewards.read_curves(tmp_path, TAGS)
    assert curves["rewards/chosen"] == ([1, 2, 3], [0.25, 0.5, 0.75])
    lines = plot_rewards.draw(curves, "title").axes[1].lines
    assert np.asarray(lines[0].get_xdata()).tolist() == [1, 2, 3]
    assert np.asarray(lines[0].get_ydata()).tolist() == [0.25, 0.5, 0.75]


def test_folder_without_a_log_is_one_message(repo: Path, tmp_path: Path, fonts: dict[str, str]) -> None:
    done = plot(repo, fonts, tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} holds no TensorBoard log (events.out.tfevents.*)\n"


def test_missing_metric_is_named(repo: Path, tmp_path: Path, fonts: dict[str, str]) -> None:
    write_log(tmp_path, TAGS[:2])
    done = plot(repo, fonts, tmp_path)
    assert done.returncode == 1
    assert "has no rewards/accuracies; it has rewards/chosen, rewards/rejected" in done.stderr
