"""The steps of a dry run: every shape of the real run, its first step first, and every bucket."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from oracle import ExampleSet, random_examples

from nxdt_align.batch import Topology
from nxdt_align.data.packing import Bucket, Layout, RowPlanner
from nxdt_align.data.steps import VISITS, DryRunDataset, DryRunStep, StepDataset, StepSampler, dry_run_steps

PER_STEP = 4


def planner(
    examples: ExampleSet, buckets: list[int] | None, fixed: bool = True, **settings: int
) -> RowPlanner:
    return RowPlanner(
        examples,
        settings.pop("layout", "shared_prompt"),  # type: ignore[arg-type]
        examples_per_step=PER_STEP,
        seq_length=128,
        buckets=buckets,
        fixed_micro_batches=fixed,
        **settings,
    )


def shape(planner: RowPlanner, step: DryRunStep) -> tuple[Bucket, int]:
    plan = planner.plan(step.examples, step.bucket)
    return plan.bucket, len(plan.rows)


@pytest.fixture
def examples() -> ExampleSet:
    """Some pairs are far longer than most, so that steps fall into several buckets."""
    short = random_examples(40, seed=0, prompt=(1, 8), response=(1, 6)).examples
    long = random_examples(5, seed=1, prompt=(30, 60), response=(10, 20)).examples
    return ExampleSet([*short, *long])


@pytest.mark.parametrize("fixed", [True, False])
def test_every_shape_of_the_run_is_visited_twice_and_its_first_step_comes_first(
    examples: ExampleSet, fixed: bool
) -> None:
    plans = planner(examples, [64, 128, 192], fixed)
    sampler = StepSampler(len(examples), PER_STEP, seed=3)
    run = [step for epoch in range(3) for step in sampler.steps(epoch)]
    steps = dry_run_steps(plans, run)
    met = {shape(plans, DryRunStep(step)) for step in run}
    assert len(met) > 1, "the data must make for several shapes"
    assert steps[0].examples == run[0]
    visits = Counter(shape(plans, step) for step in steps[1:])
    assert met <= set(visits) and set(visits.values()) == {VISITS}
    assert {bucket for bucket, _ in visits} == set(plans.buckets)


def test_a_bucket_that_no_step_needs_is_visited(examples: ExampleSet) -> None:
    """Other orders of the data may need it; one that no example fits into can never be needed."""
    few = ExampleSet(examples.examples[:4])
    plans = planner(few, [8, 64, 512])
    steps = dry_run_steps(plans, [(0, 1, 2, 3)])
    visited = {shape(plans, step)[0].tokens for step in steps}
    assert 64 in visited and 512 in visited
    assert 8 not in visited or min(plans.real_tokens(range(4))) <= 8


def test_a_dry_run_step_is_laid_into_its_bucket(examples: ExampleSet) -> None:
    plans = planner(examples, [64, 192])
    dataset = StepDataset(examples, plans, "shared_prompt", Topology())  # type: ignore[arg-type]
    steps = DryRunDataset(dataset, [DryRunStep((0,), plans.buckets[1]), DryRunStep((0,))])
    forced, chosen = steps[0], steps[1]
    assert len(steps) == 2
    assert forced[0].input_ids.shape[1] == 192 and chosen[0].input_ids.shape[1] == 64


@pytest.mark.parametrize("layout", ["none", "packed", "shared_prompt"])
def test_fixed_micro_batches_are_one_number_a_bucket(examples: ExampleSet, layout: Layout) -> None:
    """Any order, the smaller last step of an epoch included: a step needs what the sample needed, or a
    whole multiple of it."""
    fixed = planner(examples, None, layout=layout, micro_batch_size=2)  # type: ignore[arg-type]
    free = planner(examples, None, fixed=False, layout=layout, micro_batch_size=2)  # type: ignore[arg-type]
    counts: dict[Bucket, set[int]] = {}
    for epoch in range(20):
        order = np.random.default_rng(epoch).permutation(len(examples)).tolist()
        for start in range(0, len(order), PER_STEP):
            step = order[start : start + PER_STEP]
            plan = fixed.plan(step)
            counts.setdefault(plan.bucket, set()).add(len(plan.rows))
            assert sorted(i for row in plan.rows for i in row) == list(range(len(step)))
            assert len(plan.rows) >= len(free.plan(step, plan.bucket).rows)
    for bucket, seen in counts.items():
        assert all(count % min(seen) == 0 for count in seen), bucket
