"""Runs of engine nxd that train adapters, through train.sh in NxD's CPU mode: what they leave, how they
resume, and that PEFT computes the same of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_fixture import NXD, SPREAD, require_nxd
from safetensors.torch import load_file
from training_fixture import Project, scalars, train_sh

from nxdt_align.cli import main

pytestmark = pytest.mark.nxd
peft = pytest.importorskip("peft")

LORA = (
    *("model_alignment_strategy.peft.target_modules=[all-linear]", "model_alignment_strategy.peft.rank=4"),
    *("model_alignment_strategy.peft.alpha=8", "exp_manager.export_hf=adapter", "model.optim.lr=0.02"),
)
ONLINE = "model_alignment_strategy.dpo.precompute_ref_log_probs=False"
NO_DROPOUT = "model_alignment_strategy.peft.dropout=0"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With start weights on disk, so that PEFT finds the base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    require_nxd()
    project = Project.create(tmp_path_factory.mktemp("project"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(project.root)).save_pretrained(project.root / "base")
    return project


def train(repo: Path, project: Project, name: str, *overrides: str) -> tuple[Path, str]:
    start = f"exp_manager.resume_from_checkpoint={project.root}/base"
    folder = f"exp_manager.exp_dir={project.root}/{name}"
    said = train_sh(repo, project, folder, start, *NXD, *LORA, *overrides)
    return project.only_run(name), said


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(40)[None] % 60).logits
    return found


def of_peft(project: Project, folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(project.root / "base"), folder)


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf_export" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(repo: Path, project: Project) -> Path:
    return train(repo, project, "whole", *SPREAD["tensor"], "trainer.max_steps=6")[0]


def test_a_broken_off_run_ends_as_an_uninterrupted_one_to_the_last_bit(
    repo: Path, project: Project, whole: Path
) -> None:
    """With dropout, whose masks follow from the seed and the step."""
    train(repo, project, "broken", *SPREAD["tensor"], "trainer.max_steps=4")
    run, said = train(repo, project, "broken", *SPREAD["tensor"], "trainer.max_steps=6")
    assert "the policy with its adapters off, no second model" in said
    assert "resuming from this run's own checkpoint" in said
    got, want = exported(run), exported(whole)
    assert got.keys() == want.keys() and len(want) == 2 * 7 * 2
    assert all(torch.equal(got[name], want[name]) for name in want)
    losses = [value for _, value in scalars(whole)["reduced_train_loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    # Not the sixth, of the two pairs that an epoch of 22 is left with.
    assert losses[4] < losses[0] - 0.01


def test_checkpoints_hold_adapters_alone_and_are_exported_as_peft_has_them(
    project: Project, whole: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    (checkpoint,) = [f for f in (whole / "checkpoints").iterdir() if f.is_dir()]
    for shard in (checkpoint / "model").glob("*.pt"):
        held = torch.load(shard, weights_only=True)
        assert {name.rpartition(".")[2] for name in held} == {"lora_A", "lora_B"}
    want = logits(of_peft(project, whole / "hf_export"))
    assert float((want - logits(LlamaForCausalLM.from_pretrained(project.root / "base"))).abs().max()) > 1e-3
    assert main(["export", "--quiet", str(whole), str(tmp_path / "adapter")]) == 0
    assert torch.equal(logits(of_peft(project, tmp_path / "adapter")), want)
    assert main(["export", "--merge", "--quiet", str(checkpoint), str(tmp_path / "merged")]) == 0
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), want, atol=1e-5)


def test_it_trains_as_engine_native_does(project: Project, whole: Path) -> None:
    """With dropout: tensor-parallel ranks draw the masks of one process. Losses to 1e-5, or 1e-4 of them."""
    where = (
        f"exp_manager.exp_dir={project.root}/native",
        f"exp_manager.resume_from_checkpoint={project.root}/base",
    )
    # Rows with their padding, as engine nxd has them: masks are drawn for it, too.
    engine = ("distributed_strategy.engine=native", "trainer.accelerator=cpu", "data.attention=dense")
    assert project.train(*where, *engine, *LORA, "trainer.max_steps=6") == 0
    got, want = (scalars(run) for run in (whole, project.only_run("native")))
    for tag in ("reduced_train_loss", "val_loss", "rewards/margins"):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in want[tag]], rel=1e-4, abs=1e-5), tag


@pytest.mark.full
def test_a_pipeline_goes_on_from_an_adapter_against_base_and_adapter(
    repo: Path, project: Project, whole: Path
) -> None:
    """With the reference at each step, and in bf16 with float32 factors; merged at the end."""
    from transformers import LlamaForCausalLM

    given = f"exp_manager.resume_from_checkpoint={whole}"
    more = (given, ONLINE, NO_DROPOUT, "precision.type=mixed_precision", "exp_manager.export_hf=merged")
    run, said = train(repo, project, "second", *SPREAD["pipeline"], *more, "trainer.max_steps=4")
    assert "the adapter frozen" in said
    assert scalars(run)["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-4)
    checkpoint = next(f for f in (run / "checkpoints").iterdir() if f.is_dir())
    assert main(["export", "--merge", "--quiet", str(checkpoint), str(project.root / "second merged")]) == 0
    got = logits(LlamaForCausalLM.from_pretrained(run / "hf_export").float())
    want = logits(LlamaForCausalLM.from_pretrained(project.root / "second merged").float())
    assert torch.allclose(got, want, atol=0.05)


@pytest.mark.full
def test_modules_to_save_are_trained_whole(repo: Path, project: Project) -> None:
    from transformers import LlamaForCausalLM

    saved = "model_alignment_strategy.peft.modules_to_save=[lm_head]"
    run, _ = train(repo, project, "saved", *SPREAD["tensor"], saved, ONLINE, "trainer.max_steps=4")
    assert "base_model.model.lm_head.weight" in exported(run)
    assert scalars(run)["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert main(["export", "--merge", "--quiet", str(run), str(project.root / "saved merged")]) == 0
    merged = LlamaForCausalLM.from_pretrained(project.root / "saved merged")
    assert torch.allclose(logits(merged), logits(of_peft(project, run / "hf_export")), atol=1e-5)


def test_what_the_engine_does_not_train_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(message: str, *overrides: str) -> None:
        assert project.train("distributed_strategy.engine=nxd", "trainer.accelerator=cpu", *overrides) == 1
        assert message in capsys.readouterr().err

    key = "model_alignment_strategy.peft"
    says("engine nxd trains embed_tokens, lm_head and norms whole", f"{key}.modules_to_save=[o_proj]")
    says("There are: down_proj, gate_proj, k_proj", f"{key}.target_modules=[query]")


def test_the_record_of_a_checkpoint_says_the_adapters(whole: Path) -> None:
    (checkpoint,) = [f for f in (whole / "checkpoints").iterdir() if f.is_dir()]
    sizes = json.loads((checkpoint / "nxdt_align.json").read_text())["parallel"]
    assert sizes["tensor"] == 2
    from nxdt_align.run.adapters import adapter_record

    record = adapter_record(checkpoint)
    assert record is not None and record["rank"] == 4 and len(record["targets"]) == 14
