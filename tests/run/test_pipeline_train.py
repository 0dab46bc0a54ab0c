"""Layers on two processes, as torchrun starts them, against one: the same curves and weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_fixture import Project, final_weights, scalars
from transformers import AutoModelForCausalLM

from nxdt_align.cli import main

STAGES = "distributed_strategy.pipeline_model_parallel_size=2"
CHUNKS = "distributed_strategy.virtual_pipeline_model_parallel_size=2"


def test_two_stages_train_as_one_process(tmp_path: Path) -> None:
    """The reference pass, validation, clipping, norms, and a resume: 2e-5 on every curve, 5e-5 on every
    weight after 8 AdamW steps."""
    project = Project.create(tmp_path)
    logged = ("exp_manager.log_parameter_norm=True", "exp_manager.log_gradient_norm=True")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/one", *logged) == 0
    two = (f"exp_manager.exp_dir={tmp_path}/two", "trainer.devices=2", STAGES, *logged)
    project.train_spread(2, *two, "exp_manager.seconds_to_sleep=0.1", "trainer.max_steps=4")
    project.train_spread(2, *two, "exp_manager.seconds_to_sleep=0.1")
    got, want = scalars(project.only_run("two")), scalars(project.only_run("one"))
    assert [step for step, _ in got["reduced_train_loss"]] == list(range(1, 9))
    norms = ("gradient_norm", "parameter_norm")
    for tag in ("reduced_train_loss", "rewards/margins", "logps/chosen", "val_loss", *norms):
        wanted = [value for _, value in want[tag]]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, abs=2e-5, rel=2e-5), tag
    weights = final_weights(project.only_run("one"))
    found = final_weights(project.only_run("two"))
    assert set(found) == set(weights)
    for name, tensor in found.items():
        assert float((tensor - weights[name]).abs().max()) <= 5e-5, name


def test_the_plan_counts_the_rows_that_only_a_schedule_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """22 pairs by 4 in layout none: five steps of 4 pairs and one of 2, each a micro-batch. Six stages take 6
    of them at least: 2, and in the last step 4, empty ones, of two rows each, in training alone."""
    project = Project.create(tmp_path)
    (tmp_path / "config.json").write_text(
        re.sub(r'"num_hidden_layers": \d+', '"num_hidden_layers": 12', (tmp_path / "config.json").read_text())
    )
    plan = ["plan", "--config-path", str(project.root / "conf"), "--config-name", "run", "data.packing=none"]
    stages = STAGES.replace("=2", "=6")
    assert main([*plan, stages, "trainer.devices=6"]) == 0
    train, val = capsys.readouterr().out.split("val data: ")
    assert "12 rows per step over all ranks (4.7 empty)" in train
    assert "empty" not in val
    assert main([*plan, stages, "trainer.devices=6", CHUNKS]) == 0
    assert "empty" not in capsys.readouterr().out, "fewer micro-batches than ranks are one round"


@pytest.mark.full
def test_a_tied_head_over_two_stages(tmp_path: Path) -> None:
    """The export is what one process exports, to 5e-5, and transformers opens it: one weight, tied."""
    project = Project.create(tmp_path)
    shape = tmp_path / "config.json"
    shape.write_text(shape.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    steps = ("trainer.max_steps=2", "trainer.limit_val_batches=0")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/one", *steps) == 0
    project.train_spread(2, f"exp_manager.exp_dir={tmp_path}/two", "trainer.devices=2", STAGES, *steps)
    runs = [project.only_run(name) for name in ("one", "two")]
    one, two = (load_file(run / "hf_export" / "model.safetensors") for run in runs)
    assert one.keys() == two.keys() and "lm_head.weight" not in two
    for name, tensor in two.items():
        assert float((tensor - one[name]).abs().max()) <= 5e-5, name
    model = AutoModelForCausalLM.from_pretrained(runs[1] / "hf_export")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.equal(two["model.embed_tokens.weight"])
