"""The order of steps: every example once per epoch, resumable anywhere, a smaller last step."""

from __future__ import annotations

from nxdt_align.data.steps import StepSampler


def test_each_epoch_holds_every_example_once_in_its_own_order() -> None:
    steps = 0
    sampler = StepSampler(10, 4, seed=1, steps_done=lambda: steps)
    first = list(sampler)
    steps = 3
    second = list(sampler)
    assert [len(s) for s in first] == [4, 4, 2]
    assert sorted(sum(first, ())) == sorted(sum(second, ())) == list(range(10))
    assert first != second


def test_resuming_in_the_middle_of_the_second_epoch_goes_on_where_it_was() -> None:
    steps = 0
    sampler = StepSampler(10, 4, seed=1, steps_done=lambda: steps)
    steps = 3
    whole = list(sampler)
    steps = 4
    assert list(sampler) == whole[1:]
    assert len(sampler) == 3


def test_an_iterator_fetched_ahead_does_not_move_the_next_one() -> None:
    sampler = StepSampler(10, 4, seed=1)
    ahead = iter(sampler)
    next(ahead)
    assert next(iter(sampler)) == StepSampler(10, 4, seed=1).__iter__().__next__()


def test_consumed_samples_count_the_smaller_last_step() -> None:
    """10 examples by 4: steps of 4, 4, 2; after 3 steps 10, after 4 steps 14."""
    sampler = StepSampler(10, 4, seed=1)
    assert [sampler.consumed(n) for n in range(8)] == [0, 4, 8, 10, 14, 18, 20, 24]


def test_validation_keeps_the_data_sets_order() -> None:
    assert list(StepSampler(5, 2, seed=1, shuffle=False)) == [(0, 1), (2, 3), (4,)]
