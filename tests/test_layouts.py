"""Packing changes the speed and nothing else: loss, metrics and gradients of every layout against
the oracle, at every micro-batch size, with single-token responses and prompts."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    TINY,
    ExampleSet,
    ModuleWeights,
    assert_gradients_close,
    dpo_loss,
    gradients,
    orpo_loss,
    pair_logps,
    plain_model,
    random_examples,
)

from nxdt_align.batch import Topology
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset, look_up_reference
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.preference import DPOLoss
from nxdt_align.losses.reference_free import ORPOLoss
from nxdt_align.ops.attention import DenseAttention

LAYOUTS: list[Layout] = ["none", "packed", "shared_prompt"]
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 2e-5
CASES = {
    "mixed": {"prompt": (1, 30), "response": (1, 20)},
    "single-token responses": {"prompt": (1, 5), "response": (1, 1)},
    "single-token prompts": {"prompt": (1, 1), "response": (2, 9)},
    "long prompts": {"prompt": (40, 60), "response": (1, 4)},
}


def dataset(
    examples: ExampleSet, layout: Layout, micro: int, topology: Topology | None = None
) -> StepDataset:
    planner = RowPlanner(
        examples,
        layout,
        examples_per_step=len(examples),
        seq_length=96,
        ranks=1 if topology is None else topology.data_parallel_size,
        micro_batch_size=micro,
    )
    return StepDataset(examples, planner, layout, topology or Topology())  # type: ignore[arg-type]


def engine(seed: int = 0) -> NativeEngine:
    built = NativeEngine(TINY, DenseAttention())
    built.load_weights(ModuleWeights(plain_model(seed)))
    return built


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro", [1, 3])
def test_dpo(layout: Layout, case: str, micro: int) -> None:
    examples = random_examples(7, seed=len(case), **CASES[case])
    data = dataset(examples, layout, micro)
    policy = engine()
    policy.load_reference(ModuleWeights(plain_model(1)))
    output = policy.step(data[tuple(range(7))], GlobalMeanObjective(DPOLoss(0.3)))

    model, reference = plain_model(0), plain_model(1)
    wanted = dpo_loss(model, reference, examples.examples, 0.3)
    assert abs(float(output.loss - wanted.detach())) <= LOSS_TOLERANCE * max(1.0, float(wanted.detach()))
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)
    with torch.no_grad():
        logps = [pair_logps(model, e) for e in examples.examples]
        base = [pair_logps(reference, e) for e in examples.examples]
    rewards = [[0.3 * float(p[i] - r[i]) for p, r in zip(logps, base, strict=True)] for i in (0, 1)]
    accuracy = sum(c > r for c, r in zip(*rewards, strict=True)) / 7
    assert float(output.metrics["rewards/accuracies"]) == pytest.approx(accuracy, abs=1e-6)
    assert float(output.metrics["chosen_rewards"]) == pytest.approx(sum(rewards[0]) / 7, abs=1e-4)
    assert float(output.metrics["logps/rejected"]) == pytest.approx(
        float(sum(p[1] for p in logps)) / 7, rel=1e-5
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro", [1, 3])
def test_orpo(layout: Layout, case: str, micro: int) -> None:
    examples = random_examples(7, seed=len(case), **CASES[case])
    policy = engine()
    output = policy.step(
        dataset(examples, layout, micro)[tuple(range(7))], GlobalMeanObjective(ORPOLoss(0.1))
    )
    model = plain_model(0)
    wanted = orpo_loss(model, examples.examples, 0.1)
    assert abs(float(output.loss - wanted.detach())) <= LOSS_TOLERANCE * max(1.0, float(wanted.detach()))
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_shares_add_up_to_one_ranks_step(layout: Layout) -> None:
    """Loss and gradients are shares: the sum over ranks is the whole, and no example is seen twice."""
    examples = random_examples(7, seed=3)
    objective = GlobalMeanObjective(ORPOLoss(0.1))
    whole = engine()
    wanted = whole.step(dataset(examples, layout, 1)[tuple(range(7))], objective)
    total = torch.zeros(())
    summed: dict[str, torch.Tensor] = {}
    for rank in range(2):
        part = engine()
        topology = Topology(world_size=2, rank=rank, data_parallel_size=2, data_parallel_rank=rank)
        total = total + part.step(dataset(examples, layout, 1, topology)[tuple(range(7))], objective).loss
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None
            summed[name] = summed.get(name, torch.zeros_like(parameter)) + parameter.grad
    assert float(total) == pytest.approx(float(wanted.loss), abs=2e-6)
    assert_gradients_close(
        summed, {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}, GRADIENT_TOLERANCE
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_values_come_back_to_their_own_records(layout: Layout) -> None:
    """NxDT attached values in a shuffled order: on 1,000 rows none got its own."""
    examples = random_examples(23, seed=5)
    data = dataset(examples, layout, 2)
    policy = engine()
    table = torch.zeros(23, 2).numpy()
    for planned in data.reference_plan():
        batch = data.collate_planned(planned)
        logps = policy.response_logps(batch)
        for row in range(batch.num_rows):
            for slot in range(batch.slot_valid.shape[1]):
                if batch.slot_valid[row, slot]:
                    column = int(batch.slot_role[row, slot])
                    table[int(batch.record_index[row, slot]), column] = float(logps[row, slot])
    model = plain_model(0)
    with torch.no_grad():
        for index, example in enumerate(examples.examples):
            assert table[index].tolist() == pytest.approx(
                [float(p) for p in pair_logps(model, example)], rel=1e-5
            )
    for batch in data[(20, 3, 11)]:
        attached = look_up_reference(table, batch)
        assert torch.allclose(
            attached, torch.where(batch.slot_valid, policy.response_logps(batch), 0.0), atol=1e-4
        )
