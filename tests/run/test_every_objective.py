"""Objectives and their options through the command line: they train, and log what is theirs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from training_fixture import Project, scalars

DPO = "model_alignment_strategy.dpo"
NO_DPO = f"~{DPO}"
CASES = {
    "cpo": ([NO_DPO, "model_alignment_strategy.cpo.beta=0.1"], {"nll_loss"}),
    "simpo": ([NO_DPO, "model_alignment_strategy.simpo.gamma=1.0"], {"nll_loss"}),
    "orpo": ([NO_DPO, "model_alignment_strategy.orpo.nll_scale=0.5"], {"nll_loss", "log_odds_ratio"}),
    "WPO, forward KL": ([f"{DPO}.use_weighting=True", f"{DPO}.f_divergence_type=forward_kl"], set()),
    "without a reference": ([f"{DPO}.reference_free=True", f"{DPO}.loss_type=hinge"], set()),
    "three with a likelihood": (
        [
            f"{DPO}.loss_type=[sigmoid,apo_zero,ipo]",
            f"{DPO}.loss_weights=[1,0.5,0.1]",
            f"{DPO}.nll_scale=0.1",
        ],
        {"nll_loss"},
    ),
    "reference at each step": ([f"{DPO}.precompute_ref_log_probs=False", f"{DPO}.loss_type=aot"], set()),
}
ALWAYS = {"rewards/margins", "logps/chosen_per_token", "logps/rejected_per_token"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.create(tmp_path_factory.mktemp("objectives"))


@pytest.mark.parametrize("case", CASES)
def test_it_trains_and_logs(project: Project, tmp_path: Path, case: str) -> None:
    overrides, own = CASES[case]
    folder = tmp_path / "runs"
    assert project.train(f"exp_manager.exp_dir={folder}", "model.optim.lr=1e-3", *overrides) == 0
    (run,) = (folder / "run").glob("20*")
    curves = scalars(run)
    assert curves.keys() >= ALWAYS | own | {f"val_{name}" for name in own}
    assert all(math.isfinite(value) for curve in curves.values() for _, value in curve)
    losses = [value for _, value in curves["val_loss"]]
    assert len(losses) >= 2 and losses[-1] < losses[0]


def test_accuracy_by_length_is_logged_where_there_are_such_pairs(project: Project, tmp_path: Path) -> None:
    assert project.train(f"exp_manager.exp_dir={tmp_path}/runs") == 0
    (run,) = (tmp_path / "runs" / "run").glob("20*")
    curves = scalars(run)
    steps = {name: curves[f"rewards/accuracies_{name}_longer"] for name in ("chosen", "rejected")}
    assert all(0.0 <= value <= 1.0 for curve in steps.values() for _, value in curve)
    assert not any("divisor" in tag for tag in curves)
