"""A Mistral whose window is shorter than its sequences, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_fixture import Project, scalars

from nxdt_align.cli import main

WINDOW = 40
SHORT = ("trainer.max_steps=3", "data.val_dir=null")


@pytest.fixture
def mistral(tmp_path: Path) -> Project:
    project = Project.create(tmp_path)
    file = tmp_path / "config.json"
    shape = json.loads(file.read_text()) | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": WINDOW,
    }
    file.write_text(json.dumps(shape))
    return project


def losses(project: Project, name: str) -> list[float]:
    (run,) = (project.root / "experiments" / name).glob("20*")
    return [value for _, value in scalars(run)["reduced_train_loss"]]


def test_it_trains_alike_in_every_layout_and_exports_its_window(mistral: Project) -> None:
    for layout in ("none", "shared_prompt"):
        assert mistral.train(*SHORT, f"data.packing={layout}", f"exp_manager.name={layout}") == 0
    plain, shared = losses(mistral, "none"), losses(mistral, "shared_prompt")
    assert len(plain) == 3 and shared == pytest.approx(plain, rel=1e-5)
    (export,) = (mistral.root / "experiments" / "none").glob("20*/hf_export")
    assert json.loads((export / "config.json").read_text())["sliding_window"] == WINDOW


def test_a_response_longer_than_the_window_is_named(
    mistral: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    with (mistral.root / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "the", "chosen": "is " * 60, "rejected": "was"}) + "\n")
    assert mistral.train(*SHORT) != 0
    message = capsys.readouterr().err
    assert f"sliding_window: must be at least the longest response, but is {WINDOW}" in message
    assert "example 22 of data.train_dir" in message


def test_attention_that_takes_no_bounds_is_refused(
    mistral: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistral.train(*SHORT, "data.attention=causal") != 0
    assert "the layout is shared_prompt: set data.packing=none" in capsys.readouterr().err
    assert mistral.train(*SHORT, "data.attention=causal", "data.packing=none") != 0
    assert f"sliding_window is {WINDOW}, but data.seq_length 128" in capsys.readouterr().err
    plan = ["plan", *mistral.arguments("data.attention=causal")[1:]]
    assert main(plan) != 0
    assert "the layout is shared_prompt: set data.packing=none" in capsys.readouterr().err
