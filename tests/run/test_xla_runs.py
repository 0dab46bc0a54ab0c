"""Whole runs on torch_xla's CPU device: COMPILE=1, then training with validation and a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_fixture import Project, scalars
from xla_fixture import (
    SETTINGS,
    STEPS,
    Finished,
    assert_all_was_compiled_ahead,
    broken_off,
    dry_run,
    make_project,
    run,
)

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("xla"))


@pytest.fixture(scope="module")
def tried(project: Project) -> tuple[Finished, list[Path]]:
    return dry_run(project, "ahead")


@pytest.fixture(scope="module")
def ahead(project: Project, tried: Any) -> list[Finished]:
    """The run itself behind the dry run."""
    return broken_off(project, "ahead")


def test_totals_are_printed_and_the_manifest_is_all_that_is_written(tried: Any, project: Project) -> None:
    done, files = tried
    manifest = project.root / "ahead" / "compile" / "run_dpo.json"
    assert files == [manifest]
    content = json.loads(manifest.read_text())
    count = len(content["graphs"])
    lines = done.stdout.splitlines()
    assert f"Total graphs: {count}" in lines
    assert f"Total successful compilations: {count}" in lines
    assert "Total failed compilations: 0" in lines
    names = {graph["name"] for graph in content["graphs"]}
    assert names >= {"training step", "validation step", "log-probabilities without gradients"}
    trained = {shape[1] for g in content["graphs"] if g["name"] == "training step" for shape in g["shapes"]}
    assert trained == {128, 256}, "also the bucket that no step needs"
    assert len({graph["hash"] for graph in content["graphs"]}) == count


def test_no_graph_of_two_epochs_validation_and_a_resume_is_outside_the_manifest(
    ahead: list[Finished], project: Project
) -> None:
    """Neither of the run that is broken off in its second epoch nor of the one that takes it up."""
    assert_all_was_compiled_ahead(ahead, project.only_run("ahead"))


def test_orpo_trains_as_on_the_cpu(project: Project) -> None:
    """1e-5 on the first loss, 1e-4 after three AdamW steps."""
    orpo = ("~model_alignment_strategy.dpo", "model_alignment_strategy.orpo.beta=0.1")
    steps = ("trainer.max_steps=3", "trainer.limit_val_batches=0")
    run(project, "orpo-xla", *orpo, *steps)
    where = ("trainer.accelerator=cpu", f"exp_manager.exp_dir={project.root}/orpo-cpu")
    assert project.train(*SETTINGS, *orpo, *steps, *where) == 0
    got, want = (scalars(project.only_run(f"orpo-{device}")) for device in ("xla", "cpu"))
    for tag in ("reduced_train_loss", "gradient_norm", "nll_loss"):
        curves = [[value for _, value in curve[tag]] for curve in (got, want)]
        assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-4, abs=1e-4), tag
        assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-5, abs=1e-5), tag


def test_compiling_ahead_changes_no_value(ahead: list[Finished], project: Project) -> None:
    """Against one run that was neither compiled ahead nor broken off: every curve bit for bit; and against
    the plain CPU to 1e-4 after 11 AdamW steps (1e-5 of the loss before the first)."""
    never = run(project, "never", f"trainer.max_steps={STEPS}")
    assert "COMPILE=1 would list them" in never.log
    where = ("trainer.accelerator=cpu", f"exp_manager.exp_dir={project.root}/cpu")
    assert project.train(*SETTINGS, *where, f"trainer.max_steps={STEPS}") == 0
    curves = {name: scalars(project.only_run(name)) for name in ("ahead", "never", "cpu")}
    for tag, wanted in curves["never"].items():
        if not tag.startswith("throughput"):
            assert curves["ahead"][tag] == wanted, tag
    for tag in ("reduced_train_loss", "gradient_norm", "parameter_norm", "val_loss", "lr"):
        got, want = ([value for _, value in curves[name][tag]] for name in ("ahead", "cpu"))
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4), tag
        assert got[0] == pytest.approx(want[0], rel=1e-5, abs=1e-5), tag
