"""The quick starts of README and of examples/quickstart.ipynb run as they are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_fixture import Project

import nxdt_align as na


def run_script(code: str, folder: Path, repo: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(repo / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_readme(repo: Path, tmp_path: Path) -> None:
    """Ten lines of Python, and the one command, on a model and pairs that lie in the current folder."""
    project = Project.create(tmp_path / "made")
    config = na.load_config(
        project.root / "conf" / "run.yaml", "trainer.max_steps=1", "trainer.limit_val_batches=0"
    )
    export = na.train(config).export
    assert export is not None
    export.rename(tmp_path / "my_model")  # the tokenizer is in it
    (project.root / "train.jsonl").rename(tmp_path / "my_pairs.jsonl")
    text = (repo / "README.md").read_text()
    (code,) = re.findall(r"<!-- quickstart -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    said = run_script(code, tmp_path, repo)
    assert re.search(r"tensor\(0\.\d+\) tensor\(\d\.\d+\)", said.splitlines()[-1])
    (command,) = re.findall(r"^nxdt-align train --config-name dpo .*$", text, re.M)
    arguments = command.split()[1:]
    arguments += ["trainer.max_steps=2", "exp_manager.exp_dir=again"]  # else the script's run would resume
    run_script(f"import sys; from nxdt_align.cli import main; sys.exit(main({arguments!r}))", tmp_path, repo)
    assert list(tmp_path.glob("again/dpo/*/hf_export/model.safetensors"))


@pytest.mark.full
def test_notebook(repo: Path, tmp_path: Path) -> None:
    """Its cells in order; the last line of each is what a notebook would show."""
    notebook = json.loads((repo / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    (tmp_path / "demo").symlink_to(repo / "examples" / "demo")
    code = "\n".join(f"exec(compile({cell!r}, 'cell', 'exec'), globals())" for cell in cells)
    said = run_script(
        f"{code}\nprint(result.step, float(losses.mean()) > 0, len(policy.sums))", tmp_path, repo
    )
    assert said.splitlines()[-1] == "20 True 80"
