"""``nxdt-align plan``: what training says of its rows, without training; and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from training_fixture import Project

from nxdt_align.cli import main


def plan(project: Project, *overrides: str) -> int:
    return main(["plan", "--config-path", str(project.root / "conf"), "--config-name", "run", *overrides])


def test_plan_prints_the_rows_and_builds_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.create(tmp_path)
    monkeypatch.setattr("nxdt_align.models.decoder.Decoder.__init__", lambda *_: pytest.fail("a model"))
    assert plan(project) == 0
    said = capsys.readouterr().out
    assert "train data: 22 examples, 0 of them truncated; layout shared_prompt" in said
    assert "val data: 6 examples" in said
    for what in (
        "buckets: ",
        "each one graph",
        "fill: ",
        "packing saves ",
        "data-parallel ranks: 1",
        "host memory per node for data: ",
    ):
        assert what in said
    assert not (tmp_path / "experiments").exists()


def test_plan_does_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only their config.json is read, and that only where model.model_config names none."""
    project, start = Project.create(tmp_path), "exp_manager.resume_from_checkpoint"
    absent = (f"{start}={tmp_path}/far", f"model_alignment_strategy.reference_model={tmp_path}/away")
    assert plan(project, *absent) == 0
    said = capsys.readouterr()
    assert "train data: 22 examples" in said.out
    assert f"notice: train would stop: {start}: must be a folder that exists, but is" in said.err
    assert "notice: train would stop: model_alignment_strategy.reference_model: must be a folder" in said.err

    assert plan(project, *absent, "model.model_config=null") == 1
    assert f"{start}: must be a folder that exists, but is '{tmp_path}/far'" in capsys.readouterr().err
    assert plan(project, f"data.train_dir={tmp_path}/none.jsonl") == 1
    assert "data.train_dir: must be a file or folder that exists" in capsys.readouterr().err


def test_a_bucket_that_the_validation_data_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project.create(tmp_path)
    long = {"prompt": "of it", "chosen": "the " * 60, "rejected": "a " * 60}
    (tmp_path / "val.jsonl").write_text(json.dumps(long) + "\n")
    assert plan(project, "data.buckets=[128]") == 1
    assert "the longest example of data.val_dir after truncation, which takes" in capsys.readouterr().err


def test_plan_of_layout_none_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 pairs per step and 22 pairs: 6 steps of rows of 128, two a pair."""
    assert plan(Project.create(tmp_path), "data.packing=none", "data.val_dir=null") == 0
    said = capsys.readouterr().out
    assert "buckets: 1, each one graph\n    128 tokens x 1 row(s)" in said
    assert "packing saves 0% of the 5,632 padded tokens (1.0x fewer)" in said


def test_plan_for_more_ranks_than_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(Project.create(tmp_path), "trainer.devices=2") == 0
    assert "data-parallel ranks: 2" in capsys.readouterr().out


def test_plan_says_what_memory_a_device_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an engine that is not here too: engine nxd's limits and packages are no matter of a plan."""
    project = Project.create(tmp_path)
    assert plan(project, "distributed_strategy.engine=nxd") == 0
    said = capsys.readouterr().out
    assert re.search(r"memory of a NeuronCore, rows of \d+ tokens x 1, tensor parallel 1", said), said
    assert "16 GiB (trn1, 10% reserved for graphs and runtime): fits\n" in said
    assert plan(project, "trainer.accelerator=cpu") == 0
    assert "memory of a device (cpu)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("data.buckets=[8]", r"error: data.buckets: the largest must hold the longest example .* would fit"),
        ("data.buckets=[128,64]", r"data.buckets: must be positive row lengths in ascending order, but is"),
        ("data.packing=padded", r"data.packing: must be one of none, packed, shared_prompt, but is 'padded'"),
        ("data.attention=flash", r"data.attention: must be one of auto, .*, causal, nki, but is"),
    ],
)
def test_bad_input_says_what_would_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, fault: str
) -> None:
    assert plan(Project.create(tmp_path), override) == 1
    said = capsys.readouterr().err
    assert re.search(fault, said), said
