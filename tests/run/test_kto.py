"""KTO through the engine and the command line: one result for every layout and micro-batch size."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import GRADIENT_TOLERANCE, LAYOUTS, LOSS_TOLERANCE, dataset, engine
from oracle import ModuleWeights, assert_gradients_close, gradients, pair_logps, plain_model, random_examples
from training_fixture import Project, scalars, write_labelled

from nxdt_align.batch import Topology
from nxdt_align.config.alignment import KTOConfig
from nxdt_align.data.packing import Layout
from nxdt_align.data.steps import UNPAIRED_ROLES, StepDataset
from nxdt_align.losses.kto import KTOLoss
from nxdt_align.losses.objective import GlobalMeanObjective

KTO = ("~model_alignment_strategy.dpo", "model_alignment_strategy.kto.beta=0.3")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("micro", [1, 3])
def test_the_engine_against_the_oracle(layout: Layout, micro: int) -> None:
    """The divergence is a mean over the global batch, so no split of it may show."""
    examples = random_examples(7, seed=3)
    examples.examples[:] = [replace(e, desirable=i % 3 != 0) for i, e in enumerate(examples.examples)]
    planner = dataset(examples, layout, micro).planner
    data = StepDataset(examples, planner, layout, Topology(), roles=UNPAIRED_ROLES)  # type: ignore[arg-type]
    policy = engine(1)
    policy.load_reference(ModuleWeights(plain_model(0)))
    objective = GlobalMeanObjective(
        KTOLoss(KTOConfig(beta=0.3, desirable_weight=1.0, undesirable_weight=0.5))
    )
    output = policy.step(data[tuple(range(7))], objective)

    model, reference = plain_model(1), plain_model(0)
    logps = [pair_logps(model, e) for e in examples.examples]
    with torch.no_grad():
        base = [pair_logps(reference, e) for e in examples.examples]
        kl = torch.stack([p[1] - b[1] for p, b in zip(logps, base, strict=True)]).mean().clamp(min=0)
    losses = []
    for example, found, kept in zip(examples.examples, logps, base, strict=True):
        ratio = found[0] - kept[0]
        good, bad = 1 - torch.sigmoid(0.3 * (ratio - kl)), 0.5 * (1 - torch.sigmoid(0.3 * (kl - ratio)))
        losses.append(good if example.desirable else bad)
    wanted = torch.stack(losses).mean()
    assert abs(float(output.loss - wanted.detach())) <= LOSS_TOLERANCE
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)
    assert float(objective.finish(output.metrics)["kl"]) == pytest.approx(float(kl), abs=1e-4)


def test_training_from_labelled_records(tmp_path: Path) -> None:
    """A fresh run has every ratio 0: loss sigmoid(0) = 1/2. Rewards of good and bad part. The pairs that the
    records were made of, and another layout, give the same curves."""
    project = Project.create(tmp_path)
    pairs = shutil.copy(tmp_path / "train.jsonl", tmp_path / "pairs.jsonl")
    write_labelled(tmp_path)
    assert project.train(*KTO) == 0
    curves = scalars(project.only_run())
    assert curves["reduced_train_loss"][0][1] == pytest.approx(0.5, abs=1e-6)
    assert curves["reduced_train_loss"][-1][1] < 0.5
    wanted = {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "val_rewards/margins"}
    assert curves.keys() >= wanted
    assert all(math.isfinite(value) for _, value in curves["kl"])

    other = (f"exp_manager.exp_dir={tmp_path}/b", "data.packing=none", f"data.train_dir={pairs}")
    assert project.train(*KTO, *other) == 0
    again = scalars(project.only_run("b"))
    for tag in ("reduced_train_loss", "kl", "val_loss"):
        assert [v for _, v in again[tag]] == pytest.approx([v for _, v in curves[tag]], abs=2e-5), tag
