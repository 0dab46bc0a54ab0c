"""What every engine does of a global batch alike: filling the reference's log-probabilities in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from parallel_fixture import LOSSES, Case

from nxdt_align.batch import Batch, TokenStatistic
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.steps import Share, TokenLogps, with_reference
from nxdt_align.losses.objective import GlobalMeanObjective

DPO, ORPO = GlobalMeanObjective(LOSSES["dpo"]), GlobalMeanObjective(LOSSES["orpo"])


class Reference:
    """A Runner that says -1 of every response token, and keeps how many micro-batches it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        self.asked.append(len(micro_batches))
        return [TokenLogps(-torch.ones(batch.labels.shape)) for batch in micro_batches]

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        raise AssertionError("a reference is not trained")


def micro_batches() -> list[Batch]:
    case = Case()
    found = list(case.micro_batches(0, case.examples()))
    assert len(found) > 1
    return found


def stored(batch: Batch) -> Batch:
    return batch.with_reference(torch.zeros(batch.slot_valid.shape))


def test_all_of_a_step_are_asked_for_in_one_call() -> None:
    """Each slot's log-probability is minus its number of response tokens."""
    reference, given = Reference(), micro_batches()
    filled = with_reference(reference, given, DPO)
    assert reference.asked == [len(given)]
    for batch in filled:
        assert batch.reference_logps is not None
        assert torch.equal(batch.reference_logps, batch.sum_per_slot(-torch.ones(batch.labels.shape)))


def test_as_many_where_one_brings_them() -> None:
    """Another number would be another schedule of a pipeline, and another graph of a lazy device."""
    reference, (first, *others) = Reference(), micro_batches()
    with_reference(reference, [stored(first), *others], DPO)
    assert reference.asked == [1 + len(others)]


def test_those_of_the_store_stay() -> None:
    reference, given = Reference(), [stored(batch) for batch in micro_batches()]
    assert with_reference(reference, given, DPO) is given
    assert reference.asked == []


def test_a_loss_without_a_reference_needs_none() -> None:
    given = micro_batches()
    assert with_reference(None, given, ORPO) is given


def test_a_reference_that_was_not_loaded_is_named() -> None:
    with pytest.raises(EngineError, match="no reference model was loaded"):
        with_reference(None, micro_batches(), DPO)
