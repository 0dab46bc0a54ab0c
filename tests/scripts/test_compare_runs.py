"""Two runs of the same steps, on this machine CPU against CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training_fixture import Project

from scripts.compare_runs import main


def run(folder: Path, *, loss: float = 0.5, norm: float = 2.0, weight: float = 1.0, steps: int = 2) -> Path:
    (folder / "hf_export").mkdir(parents=True)
    lines = [{"step": n + 1, "reduced_train_loss": loss, "gradient_norm": norm} for n in range(steps)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": steps, "val_loss": 0.1}])
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text("precision:\n  type: fp32\n")
    save_file({"w": torch.tensor([0.0, weight])}, folder / "hf_export" / "model.safetensors")
    return folder


def test_what_is_apart_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path / "a")
    assert main([str(first), str(run(tmp_path / "same"))]) == 0
    assert capsys.readouterr().out.count(": ok") == 3
    for name, changed in {
        "loss": {"loss": 0.5002},
        "gradient norm": {"norm": 2.01},
        "weights": {"weight": 1.01},
    }.items():
        other = run(tmp_path / name, **changed)  # type: ignore[arg-type]
        assert main([str(first), str(other)]) == 1
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("NO")]
        assert line.startswith(name)
        assert main([str(first), str(other), "--tolerances", "0.1", "0.1", "0.1"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("name", ["loss", "norm", "weight"])
def test_what_is_no_number_is_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    first, other = run(tmp_path / "a"), run(tmp_path / "nan", **{name: float("nan")})  # type: ignore[arg-type]
    for runs in ([first, other], [other, first]):
        assert main([*map(str, runs)]) == 1
        assert capsys.readouterr().out.count(": NO") == 1


def test_runs_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path / "a")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(first), str(empty)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert main([str(first), str(run(tmp_path / "longer", steps=3))]) == 2
    assert "the steps [1, 2], the other [1, 2, 3]" in capsys.readouterr().err
    bare = run(tmp_path / "bare")
    (bare / "hf_export" / "model.safetensors").unlink()
    assert main([str(first), str(bare)]) == 2
    assert "exp_manager.export_hf=True exports them" in capsys.readouterr().err


@pytest.mark.full
def test_the_twin_of_a_run(tmp_path: Path, repo: Path) -> None:
    project = Project.create(tmp_path)
    variables = {"CONF_FILE": str(project.root / "conf" / "run.yaml"), "STEPS": "4"}
    done = subprocess.run(
        [str(repo / "examples" / "parity.sh"), "data.packing=packed"],
        cwd=tmp_path,
        env={**os.environ, **variables, "NXDT_ALIGN_PYTHON": sys.executable, "TWIN": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(": ok") == 3
