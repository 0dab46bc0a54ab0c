"""Packing changes the speed and nothing else: loss, metrics and gradients of every layout against
the oracle, at every micro-batch size, with single-token responses and prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from layouts import ATTENTIONS, CASES, GRADIENT_TOLERANCE, LAYOUTS, LOSS_TOLERANCE, dataset, engine
from oracle import (
    TINY,
    ModuleWeights,
    assert_gradients_close,
    dpo_loss,
    gradients,
    orpo_loss,
    pair_logps,
    plain_model,
    random_examples,
    response_logp,
)
from torch import Tensor

from nxdt_align.batch import Topology
from nxdt_align.config.alignment import DPOConfig, ORPOConfig
from nxdt_align.data.collate import GlobalCounts
from nxdt_align.data.packing import Layout, RowPlanner, shares_prompt
from nxdt_align.data.steps import StepDataset, look_up_reference
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.models.decoder import Decoder
from nxdt_align.ops.attention_flex import FlexAttention


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro", [pytest.param(1, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dpo(layout: Layout, case: str, micro: int, attention: str) -> None:
    examples = random_examples(7, seed=len(case), **CASES[case])
    data = dataset(examples, layout, micro)
    policy = engine(attention=attention)
    policy.load_reference(ModuleWeights(plain_model(1)))
    output = policy.step(data[tuple(range(7))], GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.3))))

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
@pytest.mark.parametrize("micro", [pytest.param(1, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_orpo(layout: Layout, case: str, micro: int, attention: str) -> None:
    examples = random_examples(7, seed=len(case), **CASES[case])
    policy = engine(attention=attention)
    output = policy.step(
        dataset(examples, layout, micro)[tuple(range(7))], GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=0.1)))
    )
    model = plain_model(0)
    wanted = orpo_loss(model, examples.examples, 0.1)
    assert abs(float(output.loss - wanted.detach())) <= LOSS_TOLERANCE * max(1.0, float(wanted.detach()))
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["dense", "blocks"])
def test_two_ranks_shares_add_up_to_one_ranks_step(layout: Layout, attention: str) -> None:
    """Loss and gradients are shares: the sum over ranks is the whole, and no example is seen twice."""
    examples = random_examples(7, seed=3)
    objective = GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=0.1)))
    whole = engine(attention=attention)
    wanted = whole.step(dataset(examples, layout, 1)[tuple(range(7))], objective)
    total = torch.zeros(())
    summed: dict[str, torch.Tensor] = {}
    for rank in range(2):
        part = engine(attention=attention)
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flex_gives_the_loss(layout: Layout) -> None:
    """Forward alone, uncompiled: off CUDA torch has no backward pass of FlexAttention."""
    examples = random_examples(7, seed=2)
    policy = NativeEngine(TINY, FlexAttention(compiled=False))
    policy.load_weights(ModuleWeights(plain_model(0)))
    output = policy.evaluate(
        dataset(examples, layout, 2)[tuple(range(7))], GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=0.1)))
    )
    with torch.no_grad():
        wanted = orpo_loss(plain_model(0), examples.examples, 0.1)
    assert float(output.loss) == pytest.approx(float(wanted), rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_examples_has_zero_gradients(layout: Layout) -> None:
    """Empty rows alone: with blocks, a row without a single token."""
    data = dataset(random_examples(4, seed=1), layout, 1)
    empty = data._collate([()], data.planner.buckets[-1], GlobalCounts(4, 40))
    for attention in ATTENTIONS:
        policy = engine(attention=attention)
        output = policy.step([empty], GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=0.1))))
        assert float(output.loss) == 0.0
        for name, parameter in policy.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_step_of_random_lengths_and_truncated_pairs_in_every_layout() -> None:
    """Six steps of lengths drawn anew, some prompts at the truncation limit, some responses of one token,
    one to twelve pairs: every layout and attention gives the first one's loss, metrics and gradients."""
    rng = np.random.default_rng(0)
    for seed in range(6):
        count = int(rng.integers(1, 13))
        longest = int(rng.integers(1, 60))
        examples = random_examples(
            count, seed, prompt=(int(rng.integers(1, longest + 1)), longest), response=(1, 96 - longest)
        )
        wanted = None
        for layout in LAYOUTS:
            for attention in ("dense", "blocks"):
                policy = engine(attention=attention)
                micro = int(rng.integers(1, 4))
                output = policy.step(
                    dataset(examples, layout, micro)[tuple(range(count))],
                    GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=0.1))),
                )
                got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
                if wanted is None:
                    model = plain_model(0)
                    truth = orpo_loss(model, examples.examples, 0.1)
                    assert float(output.loss) == pytest.approx(float(truth.detach()), rel=1e-5)
                    wanted = (output, gradients(truth, model))
                assert float(output.loss) == pytest.approx(float(wanted[0].loss), rel=2e-6)
                for name, value in output.metrics.items():
                    assert float(value) == pytest.approx(float(wanted[0].metrics[name]), rel=1e-4, abs=1e-5)
                assert_gradients_close(got, wanted[1], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_tail_weights_count_a_responses_last_tokens(layout: Layout, case: str) -> None:
    """LD-DPO: tokens beyond the pair's shorter response weigh 0.25, also of a reversed response."""
    examples = random_examples(5, seed=1, **CASES[case])
    planner = RowPlanner(examples, layout, examples_per_step=5, seq_length=96)
    data = StepDataset(examples, planner, layout, Topology(), tail_weight=0.25)  # type: ignore[arg-type]
    policy, model = engine(), plain_model(0)
    found = {}
    for batch in data[tuple(range(5))]:
        values = policy.response_logps(batch)
        for row, slot in batch.slot_valid.nonzero().tolist():
            record, role = int(batch.record_index[row, slot]), int(batch.slot_role[row, slot])
            found[record, role] = float(values[row, slot])
    for record, example in enumerate(examples.examples):
        shorter = min(map(len, example.responses))
        for role, response in enumerate(example.responses):
            with torch.no_grad():
                whole = float(response_logp(model, example.prompt, response))
                head = float(response_logp(model, example.prompt, response[:shorter]))
            assert found[record, role] == pytest.approx(head + 0.25 * (whole - head), rel=1e-5)


WINDOW = 12


def windowed(q: Tensor, k: Tensor, v: Tensor, context: object) -> Tensor:
    """Softmax over the last WINDOW tokens, by a mask of positions: no bounds."""
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril().triu(1 - WINDOW)
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bsnh,btnh->bnst", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnst,btnh->bsnh", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sliding_window(layout: Layout, attention: str) -> None:
    """Pairs of up to 42 tokens, of which a token sees the last 12: some are laid around their prompt, others
    as packed."""
    shape = replace(TINY, model_type="mistral", sliding_window=WINDOW)
    examples = random_examples(7, seed=4, prompt=(1, 30), response=(1, WINDOW))
    planner = RowPlanner(examples, layout, examples_per_step=7, seq_length=96, window=WINDOW)
    data = StepDataset(examples, planner, layout, Topology())  # type: ignore[arg-type]
    shared = shares_prompt(examples.prompt_lengths, examples.response_lengths, WINDOW)
    assert 0 < shared.sum() < 7
    policy = NativeEngine(shape, ATTENTIONS[attention])
    policy.load_weights(ModuleWeights(plain_model(0)))
    policy.load_reference(ModuleWeights(plain_model(1)))
    output = policy.step(data[tuple(range(7))], GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.3))))

    model, reference = (Decoder(shape, windowed) for _ in range(2))
    model.load_state_dict(plain_model(0).state_dict())
    reference.load_state_dict(plain_model(1).state_dict())
    wanted = dpo_loss(model, reference, examples.examples, 0.3)
    assert abs(float(output.loss - wanted.detach())) <= LOSS_TOLERANCE * max(1.0, float(wanted.detach()))
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)
