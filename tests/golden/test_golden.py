"""Today's results are what they were before the code was moved: values in values/*.json, and files that an
earlier version wrote, in written/. ``make.py`` beside this file renews them, in a change that says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_probe import (
    RUNS,
    STOPPED,
    VALUES,
    WRITTEN,
    alone,
    assert_golden,
    copy_project,
    main,
    read_caches,
    read_run,
    two_processes,
    values_alone,
)
from safetensors.torch import load_file


def golden(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((VALUES / f"{name}.json").read_text())
    return values


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return values_alone(copy_project(tmp_path_factory.mktemp("golden")), list(RUNS))


@pytest.mark.parametrize("name", RUNS)
def test_one_process(name: str, found: dict[str, Any]) -> None:
    """Record ids, rows of tokens, gradients of the first step, every curve, the weights after 5 steps, the
    export, the run's identity and the keys of both caches."""
    assert_golden(found[name], golden(name)["one process"], name)


def test_two_processes(tmp_path: Path) -> None:
    found = two_processes(copy_project(tmp_path), list(RUNS))
    for name in RUNS:
        assert_golden(found[name], golden(name)["two processes"], name)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The project beside a run of an earlier version that was stopped after 3 of its 5 steps."""
    project = copy_project(tmp_path)
    shutil.copytree(WRITTEN / "cache", project / f"cache_{STOPPED}")
    shutil.copytree(WRITTEN / "run", project / "experiments" / STOPPED / "2025-01-01_00-00-00")
    return project


def test_an_earlier_versions_run_resumes(stopped: Path) -> None:
    """Its checkpoint is found and read with its optimizer, its reference values and tokens are used again
    (a tokenizer that cannot tokenize proves it), and it ends where a run ended that was never stopped."""
    before = contents(stopped / f"cache_{STOPPED}")
    run = Path(alone("reuse", str(stopped), STOPPED).splitlines()[-1])
    assert run.name == "2025-01-01_00-00-00", "the same run, no new one"
    found = read_run(run)
    want = golden(STOPPED)["one process"]
    assert found["identity"] == want["identity"]
    assert_golden(found["export"], want["export"])
    for tag, points in found["curves"].items():
        assert_golden(points, [point for point in want["curves"][tag] if point[0] > 3], tag)
    assert contents(stopped / f"cache_{STOPPED}") == before, "nothing was computed again"
    assert read_caches(stopped / f"cache_{STOPPED}") == want["caches"]


def test_an_earlier_versions_run_is_exported(stopped: Path) -> None:
    """By its checkpoint alone, without its configuration."""
    (checkpoint,) = (WRITTEN / "run" / "checkpoints").iterdir()
    assert main(["export", str(checkpoint), str(stopped / "exported"), "--quiet"]) == 0
    got, start = (load_file(stopped / name / "model.safetensors") for name in ("exported", "start"))
    assert got.keys() == start.keys() and not torch.equal(got["lm_head.weight"], start["lm_head.weight"])


def test_an_earlier_versions_shards_convert_back(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    assert main(["convert", str(WRITTEN / "shards"), str(tmp_path / "back"), "--quiet"]) == 0
    got, want = (load_file(project / name / "model.safetensors") for name in ("back", "start"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
