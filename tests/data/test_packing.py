"""The row plan: nothing lost, static shapes, equal work, and errors that say what would fit."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from row_plans import LAYOUTS, FakeLengths, lengths, planner

from nxdt_align.config.load import load_config
from nxdt_align.data.packing import ROUNDING, Layout, example_tokens
from nxdt_align.errors import UserError
from nxdt_align.models.presets import LLAMA3_8B
from nxdt_align.planning.rows import PlanReport
from nxdt_align.planning.step_time import RowSeconds


def test_places_of_one_pair_in_each_layout() -> None:
    """Prompt 5, responses 3 and 2. A row lacks each response's last token: 4 + 3 and 4 + 2 places
    apart, 4 + 3 + 2 with the prompt once."""
    data = FakeLengths(np.array([5]), np.array([[3, 2]]))
    assert example_tokens(data, "none").tolist() == [7]
    assert example_tokens(data, "packed").tolist() == [13]
    assert example_tokens(data, "shared_prompt").tolist() == [9]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks,micro", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_every_example_once_within_the_bucket(layout: Layout, ranks: int, micro: int, seed: int) -> None:
    data = lengths(seed=seed)
    plans = planner(data, layout, ranks=ranks, micro_batch_size=micro)
    tokens = example_tokens(data, layout)
    for step in np.array_split(np.random.default_rng(seed).permutation(100), 13):
        plan = plans.plan(step.tolist())
        placed = [i for row in plan.rows for i in row]
        assert sorted(placed) == list(range(len(step)))
        for row in plan.rows:
            assert tokens[step[list(row)]].sum() <= plan.bucket.tokens
            assert data.response_lengths[step[list(row)]].sum() <= plan.bucket.responses or layout == "none"
            assert len(row) * (1 if layout == "none" else 2) <= max(plan.bucket.slots, 1)
        shares = [plans.rows_of_rank(plan, rank) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        assert all(len(rows) == micro for share in shares for rows in share)
        dealt = sorted(i for share in shares for rows in share for row in rows for i in row)
        assert dealt == list(range(len(step)))


def test_few_buckets_and_the_largest_holds_the_longest() -> None:
    data = lengths(1000)
    buckets = planner(data, "shared_prompt", examples_per_step=16).buckets
    assert 1 <= len(buckets) <= 3
    assert buckets[-1].tokens >= example_tokens(data, "shared_prompt").max()
    assert [b.tokens for b in buckets] == sorted(b.tokens for b in buckets)


def test_a_pipeline_gets_its_least_number_of_micro_batches() -> None:
    data = lengths()
    plans = planner(data, "shared_prompt", min_micro_batches=4, ranks=2)
    assert len(plans.rows_of_rank(plans.plan([0]), 1)) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("pairs", "count"), [(1, 1), (3, 3), (4, 4), (7, 7), (9, 10), (11, 12), (13, 15)])
def test_an_interleaved_pipeline_gets_rounds_of_one_size(layout: Layout, pairs: int, count: int) -> None:
    """Rounds of at least 4, as many as there can be: 9 would be 2 of 4 and one over, 10 is 2 of 5; 11 would
    be 5 and 6, 12 is 3 of 4; 13 and 14 are no multiple of 3."""
    data = FakeLengths(np.full(pairs, 50), np.full((pairs, 2), 10))
    plans = planner(data, layout, round_size=4, buckets=[100] if layout == "none" else [128])
    micro_batches = plans.rows_of_rank(plans.plan(range(pairs)), 0)
    assert len(micro_batches) == count
    assert sorted(i for rows in micro_batches for row in rows for i in row) == list(range(pairs))


def test_buckets_are_chosen_with_the_pipelines_empty_rows_in_mind() -> None:
    """8 pairs of 40 places: one row of 320 holds them, but a pipeline of 4 would pad it to four such rows,
    1280 places, where rows of 64 take 512: that bucket would save nothing."""
    data = FakeLengths(np.full(64, 21), np.full((64, 2), 10))
    assert [b.tokens for b in planner(data, "shared_prompt").buckets] == [64, 320]
    piped = planner(data, "shared_prompt", min_micro_batches=4)
    assert [b.tokens for b in piped.buckets] == [64]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_get_about_equal_work(ranks: int) -> None:
    """64 pairs per step: no rank has over 5% more tokens than the mean of them."""
    data = lengths(640)
    plans = planner(data, "shared_prompt", ranks=ranks, examples_per_step=64)
    report = PlanReport.measure(plans, 640, 64, 100)
    assert 1 <= report.imbalance < 1.05
    assert report.steps == sum(report.steps_of_bucket.values()) == 10


@pytest.mark.parametrize(("pairs", "ranks", "micro"), [(4, 4, 1), (6, 2, 3), (9, 3, 1)])
def test_ranks_share_a_step_that_fits_fewer_rows(pairs: int, ranks: int, micro: int) -> None:
    """Pairs of 9 places, up to 7 of them in a row of 64: the rows that every rank has to have anyway take
    an equal share each."""
    data = FakeLengths(np.full(36, 5), np.tile([3, 2], (36, 1)))
    plans = planner(data, "shared_prompt", ranks=ranks, micro_batch_size=micro, examples_per_step=pairs)
    step = plans.plan(range(pairs))
    assert len(step.rows) == ranks * micro
    assert sorted(len(row) for row in step.rows) == [pairs // (ranks * micro)] * (ranks * micro)
    assert PlanReport.measure(plans, 36, pairs, 100).imbalance == 1.0


def test_equal_rows_are_no_more_rows() -> None:
    """Work is made equal in the rows that one rank would fill, and examples stay within a row's places."""
    data = lengths(400, seed=3)
    one = planner(data, "shared_prompt", examples_per_step=40, buckets=[192])
    four = planner(data, "shared_prompt", examples_per_step=40, buckets=[192], ranks=4)
    for step in np.split(np.arange(400), 10):
        fewest = len(one.plan(step.tolist()).rows)
        assert len(four.plan(step.tolist()).rows) == -(-fewest // 4) * 4


def test_layout_none_is_rows_of_seq_length() -> None:
    plans = planner(lengths(), "none")
    assert [b.tokens for b in plans.buckets] == [100]


def test_planned_steps_do_not_depend_on_ranks() -> None:
    """The same step on 1 and 4 ranks holds the same examples; only empty rows are added."""
    data = lengths()
    one, four = planner(data, "packed"), planner(data, "packed", ranks=4, buckets=None)
    step = list(range(8))
    assert sorted(i for r in one.plan(step).rows for i in r) == sorted(
        i for r in four.plan(step).rows for i in r
    )


def test_longest_example_must_fit_the_largest_bucket() -> None:
    data = FakeLengths(np.array([50]), np.array([[30, 30]]))
    with pytest.raises(
        UserError, match=r"takes 109 tokens in layout shared_prompt, but is 64; 128 would fit"
    ):
        planner(data, "shared_prompt", buckets=[64])


@pytest.mark.parametrize("buckets", [[128, 64], [64, 64], [], [0, 64]])
def test_buckets_must_ascend(buckets: list[int]) -> None:
    with pytest.raises(UserError, match=r"data\.buckets: must be positive row lengths in ascending order"):
        planner(lengths(), "packed", buckets=buckets)


def test_dear_long_rows_are_not_chosen() -> None:
    """Pairs of about 1,000 tokens. By positions, rows of several pairs waste least; where a token costs as
    much as its row is long, rows of one pair cost least."""
    rng = np.random.default_rng(0)
    data = FakeLengths(rng.integers(500, 600, 640), rng.integers(180, 260, (640, 2)))
    longest = int(example_tokens(data, "shared_prompt").max())
    by_positions = planner(data, "shared_prompt", examples_per_step=64)
    squared = planner(
        data, "shared_prompt", examples_per_step=64, row_cost=lambda bucket: float(bucket.tokens**2)
    )
    assert max(b.tokens for b in by_positions.buckets) > 2 * longest
    assert max(b.tokens for b in squared.buckets) < longest + ROUNDING
    plan = squared.plan(range(64))
    assert sorted(i for row in plan.rows for i in row) == list(range(64))


def test_rows_are_a_multiple_of_what_a_kernel_asks_for() -> None:
    """Also where they are chosen from the data: multiples of 64 else."""
    chosen = planner(lengths(), "packed", row_multiple=96).buckets
    assert chosen and all(bucket.tokens % 192 == 0 for bucket in chosen)
    with pytest.raises(UserError, match=r"data\.buckets: must be multiples of 96"):
        planner(lengths(), "packed", row_multiple=96, buckets=[1000])


def test_a_plan_goes_to_another_process() -> None:
    """As to a data loader's workers where they are not forked, also with what rows cost on Trainium."""
    data, cost = lengths(), RowSeconds(load_config("hf_llama3_8B_DPO_config"), LLAMA3_8B)
    for row_cost in (None, cost):
        plans = planner(data, "packed", row_cost=row_cost)
        assert pickle.loads(pickle.dumps(plans)).plan([3, 1]) == plans.plan([3, 1])
