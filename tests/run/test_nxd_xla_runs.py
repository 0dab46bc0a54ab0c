"""Whole runs of engine nxd on torch_xla's CPU device: COMPILE=1, then training with validation and a resume.

As trn1 is set up: bf16, master weights and optimizer states under ZeRO-1, a file per tensor in checkpoints.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_fixture import require_nxd
from safetensors.torch import load_file
from training_fixture import Project, scalars
from xla_fixture import STEPS, Finished, assert_all_was_compiled_ahead, broken_off, dry_run, make_project, run

pytestmark = [pytest.mark.nxd, pytest.mark.xla]
NXD = (
    *("distributed_strategy.engine=nxd", "distributed_strategy.zero1=True", "model.qkv_linear=True"),
    *("precision.type=mixed_precision", "exp_manager.save_xser=True", "exp_manager.seconds_to_sleep=0.1"),
    "exp_manager.export_hf=True",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    require_nxd()
    return make_project(tmp_path_factory.mktemp("nxd"))


@pytest.fixture(scope="module")
def tried(project: Project) -> tuple[Finished, list[Path]]:
    return dry_run(project, "ahead", *NXD)


@pytest.fixture(scope="module")
def ahead(project: Project, tried: Any) -> list[Finished]:
    """The run itself behind the dry run."""
    return broken_off(project, "ahead", *NXD)


def test_the_manifest_is_all_that_is_written(tried: Any, project: Project) -> None:
    done, files = tried
    assert files == [project.root / "ahead" / "compile" / "run_dpo.json"]
    graphs = json.loads(files[0].read_text())["graphs"]
    assert f"Total graphs: {len(graphs)}" in done.stdout.splitlines()
    assert "Total failed compilations: 0" in done.stdout.splitlines()
    tokens: dict[str, set[int]] = {}
    for graph in graphs:
        tokens.setdefault(graph["name"], set()).update(shape[1] for shape in graph["shapes"])
    both = {128, 256}  # also the bucket that no step needs
    assert tokens["training step"] == tokens["validation step"] == both
    assert tokens["log-probabilities without gradients"] <= both


def test_no_graph_of_two_epochs_validation_and_a_resume_is_outside_the_manifest(
    ahead: list[Finished], project: Project
) -> None:
    assert_all_was_compiled_ahead(ahead, project.only_run("ahead"))
    assert (project.only_run("ahead") / "hf_export" / "config.json").is_file()


def test_compiling_ahead_changes_no_value(ahead: list[Finished], project: Project) -> None:
    """Against one run that was neither compiled ahead nor broken off: every curve bit for bit."""
    never = run(project, "never", *NXD, f"trainer.max_steps={STEPS}")
    assert "COMPILE=1 would list them" in never.log
    got, want = (scalars(project.only_run(name)) for name in ("ahead", "never"))
    assert got.keys() == want.keys()
    for tag, wanted in want.items():
        if not tag.startswith("throughput"):
            assert got[tag] == wanted, tag


def test_it_trains_as_the_native_engine_does(project: Project) -> None:
    """In fp32, without ZeRO-1: losses to 1e-5 of the plain CPU's, the gradients' norm to 1e-4."""
    settings = ("trainer.max_steps=4", "precision.type=fp32", "distributed_strategy.zero1=False")
    run(project, "fp32", *NXD, *settings)
    where = (f"exp_manager.exp_dir={project.root}/plain", "trainer.accelerator=cpu")
    native = ("distributed_strategy.engine=native", "exp_manager.export_hf=False", "data.buckets=[128,256]")
    assert project.train(*where, *native, *settings, "exp_manager.log_gradient_norm=True") == 0
    got, want = (scalars(project.only_run(name)) for name in ("fp32", "plain"))
    for tag, tolerance in (("reduced_train_loss", 1e-5), ("val_loss", 1e-5), ("gradient_norm", 1e-4)):
        wanted = [value for _, value in want[tag]]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, abs=tolerance, rel=tolerance), tag


LORA = (
    *(*NXD, "exp_manager.export_hf=adapter", "model.activations_checkpoint_granularity=full"),
    "model_alignment_strategy.peft.target_modules=[q_proj,v_proj,down_proj]",
    *("model_alignment_strategy.peft.rank=4", "data.buckets=[128]"),
)
ONLINE = "model_alignment_strategy.dpo.precompute_ref_log_probs=False"


@pytest.mark.parametrize(
    "more", [pytest.param((), marks=pytest.mark.full), (ONLINE,)], ids=["stored", "at each step"]
)
def test_adapters_are_compiled_ahead_and_go_on_bit_for_bit(project: Project, more: tuple[str, ...]) -> None:
    """With dropout, whose masks are drawn on the device and again where layers are recomputed; the reference
    is the policy with its adapters off. The first step after the resume has other numbers of micro-batches
    than the run's first, and at each step the reference's graphs come before those of its gradients."""
    name = f"adapters {len(more)}"
    done, files = dry_run(project, f"{name} ahead", *LORA, *more)
    assert files == [project.root / f"{name} ahead" / "compile" / "run_dpo.json"]
    assert "Total failed compilations: 0" in done.stdout.splitlines()
    parts = broken_off(project, f"{name} ahead", *LORA, *more)
    broken = project.only_run(f"{name} ahead")
    assert_all_was_compiled_ahead(parts, broken)
    run(project, f"{name} never", *LORA, *more, f"trainer.max_steps={STEPS}")
    never = project.only_run(f"{name} never")
    got, want = scalars(broken), scalars(never)
    for tag in ("reduced_train_loss", "val_loss", "gradient_norm", "parameter_norm"):
        assert got[tag] == want[tag], tag
    assert got["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=2e-3)
    first, second = (load_file(r / "hf_export" / "adapter_model.safetensors") for r in (broken, never))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(float(t.abs().max()) > 0 for key, t in first.items() if "lora_B" in key)
