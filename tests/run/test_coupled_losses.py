"""Losses that couple a global batch's examples, through the engine and through the command line: the
same result for every layout, micro-batch size and number of ranks, and across a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import GRADIENT_TOLERANCE, LAYOUTS, LOSS_TOLERANCE, dataset, engine
from oracle import (
    ModuleWeights,
    assert_gradients_close,
    gradients,
    pair_logps,
    plain_model,
    random_examples,
)
from training_fixture import Project, final_weights, scalars

from nxdt_align.config.alignment import DPOConfig
from nxdt_align.data.packing import Layout
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.types import ResponseLogps

LOSSES = {
    "aot": DPOLoss(DPOConfig(kl_beta=0.3, loss_type=("aot",))),
    "bco": DPOLoss(DPOConfig(kl_beta=0.3, loss_type=("bco_pair",), nll_scale=0.1)),
}


def whole_batch(sums: torch.Tensor, lengths: list[int]) -> ResponseLogps:
    count = len(sums)
    return ResponseLogps(
        sums=sums,
        counts=torch.tensor(lengths, dtype=torch.float32),
        valid=torch.ones(count, dtype=torch.bool),
        desirable=torch.ones(count, dtype=torch.bool),
        roles=torch.zeros(count, dtype=torch.long),
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("micro", [1, 3])
def test_the_engine_against_one_pass_over_the_whole_batch(name: str, layout: Layout, micro: int) -> None:
    examples = random_examples(7, seed=3)
    policy = engine()
    policy.load_reference(ModuleWeights(plain_model(1)))
    objective = GlobalMeanObjective(LOSSES[name])
    batches = dataset(examples, layout, micro)[tuple(range(7))]
    evaluated = policy.evaluate(batches, objective)
    output = policy.step(batches, objective)

    model, reference = plain_model(0), plain_model(1)
    lengths = [len(r) for e in examples.examples for r in e.responses]
    sums = torch.stack([p for e in examples.examples for p in pair_logps(model, e)])
    with torch.no_grad():
        base = torch.stack([p for e in examples.examples for p in pair_logps(reference, e)])
    wanted = LOSSES[name](whole_batch(sums, lengths), whole_batch(base, lengths)).losses.mean()
    for loss in (output.loss, evaluated.loss):
        assert abs(float(loss - wanted.detach())) <= LOSS_TOLERANCE * max(1.0, float(wanted.detach()))
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ld_dpo_weighs_policy_and_reference_alike(layout: Layout) -> None:
    """alpha 0: beyond the shorter response's length nothing counts, as if the longer one were cut there."""
    examples = random_examples(7, seed=3)
    cut = random_examples(7, seed=3)
    for i, example in enumerate(cut.examples):
        shorter = min(len(r) for r in example.responses)
        responses = tuple(r[:shorter] for r in example.responses)
        cut.examples[i] = type(example)(example.record_id, example.prompt, responses)
    losses = []
    for given, weight in ((examples, 0.0), (cut, None)):
        data = dataset(given, layout, 2)
        data = type(data)(given, data.planner, layout, data._topology, weight)  # type: ignore[arg-type]
        policy = engine()
        policy.load_reference(ModuleWeights(plain_model(1)))
        objective = GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.3)))
        output = policy.step(data[tuple(range(7))], objective)
        losses.append([float(output.loss), float(output.metrics["rewards/margins"])])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.full
def test_two_processes_and_a_resume_train_as_one_run(tmp_path: Path) -> None:
    """BCO's running mean comes back from the checkpoint; sorting is over both processes' pairs."""
    project = Project.create(tmp_path)
    loss = (
        "model_alignment_strategy.dpo.loss_type=[aot,bco_pair]",
        "model_alignment_strategy.dpo.ld_alpha=0.5",
        "trainer.max_steps=6",
    )
    assert project.train(f"exp_manager.exp_dir={tmp_path}/one", *loss) == 0
    two = (f"exp_manager.exp_dir={tmp_path}/two", "trainer.devices=2", "exp_manager.seconds_to_sleep=0.1")
    project.train_spread(2, *two, *loss, "trainer.max_steps=4")
    project.train_spread(2, *two, *loss)
    got, want = scalars(project.only_run("two")), scalars(project.only_run("one"))
    assert [step for step, _ in got["reduced_train_loss"]] == list(range(1, 7))
    for tag in ("reduced_train_loss", "rewards/margins", "gradient_norm", "val_loss"):
        wanted = [value for _, value in want[tag]]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, abs=2e-5, rel=2e-5), tag
    weights = final_weights(project.only_run("one"))
    for name, tensor in final_weights(project.only_run("two")).items():
        assert float((tensor - weights[name]).abs().max()) <= 5e-5, name
