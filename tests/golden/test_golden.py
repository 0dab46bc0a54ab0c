"""Today's results are what they were before the code was moved: values in values/*.json, and files that an
earlier version wrote, in written/. ``make.py`` beside this file renews them, in a change that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_probe import (
    RUNS,
    STOPPED,
    VALUES,
    WRITTEN,
    assert_golden,
    copy_project,
    main,
    read_caches,
    read_run,
    resume,
    stopped_project,
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


@pytest.mark.full
def test_two_processes(tmp_path: Path) -> None:
    found = two_processes(copy_project(tmp_path), list(RUNS))
    for name in RUNS:
        assert_golden(found[name], golden(name)["two processes"], name)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    return stopped_project(tmp_path)


def test_an_earlier_versions_run_resumes(stopped: Path) -> None:
    """Its checkpoint is found and read with its optimizer, its reference values and tokens are used again
    (a tokenizer that cannot tokenize proves it), and it ends where a run ended that was never stopped: to
    rounding, since its first three steps' rows were laid out by that version, before rows had bounds."""
    before = contents(stopped / f"cache_{STOPPED}")
    run = resume(stopped)
    assert run.name == "2025-01-01_00-00-00", "the same run, no new one"
    found = read_run(run)
    want, resumed = (golden(STOPPED)[name] for name in ("one process", "resumed"))
    assert found["identity"] == want["identity"]
    assert_golden(found, resumed)
    for tag, points in found["curves"].items():
        whole = [value for step, value in want["curves"][tag] if step > 3]
        assert [value for _, value in points] == pytest.approx(whole, abs=1e-5, rel=1e-6), tag
    for name, tensor in found["export"]["tensors"].items():
        assert tensor["values"] == pytest.approx(want["export"]["tensors"][name]["values"], abs=1e-5), name
    after = contents(stopped / f"cache_{STOPPED}")
    added = {path for path in after if path not in before}
    assert all(path.parent.name == "tables" for path in added), "copies of stored values, to be mapped"
    assert {p: b for p, b in after.items() if p not in added} == before, "nothing was computed again"
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
