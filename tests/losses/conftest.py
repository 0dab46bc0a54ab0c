from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, Batch, SlotRole

Rows = Sequence[Sequence[int]]


def make_batch(rows: Rows, pairs: float, tokens: float, reference: Tensor | None = None) -> Batch:
    """A batch whose rows hold responses of the given lengths; length 0 is an empty place.

    Only the fields that losses read mean anything. Padding carries slot 0, as a collator may leave it.
    """
    slots = max(len(row) for row in rows)
    positions = max(1, max(sum(row) for row in rows))
    labels = torch.full((len(rows), positions), IGNORE_LABEL)
    slot_index = torch.zeros(len(rows), positions, dtype=torch.long)
    valid = torch.zeros(len(rows), slots, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0
        for slot, length in enumerate(row):
            labels[b, start : start + length] = 1
            slot_index[b, start : start + length] = slot
            valid[b, slot] = length > 0
            start += length
    tokens_shape = torch.zeros(len(rows), 2, dtype=torch.long)
    return Batch(
        input_ids=tokens_shape,
        position_ids=tokens_shape,
        key_start=tokens_shape.int(),
        key_stop=tokens_shape.int(),
        response_positions=torch.zeros_like(labels),
        labels=labels,
        slot_index=slot_index,
        slot_valid=valid,
        slot_role=torch.full((len(rows), slots), int(SlotRole.SINGLE)),
        desirable=torch.ones(len(rows), slots, dtype=torch.bool),
        record_index=torch.arange(len(rows) * slots).reshape(len(rows), slots),
        global_pairs=torch.tensor(pairs),
        global_tokens=torch.tensor(tokens),
        reference_logps=reference,
    )


def take_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows ``start`` to ``stop`` as a micro-batch of the same global batch."""
    values = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    cut = {name: v[start:stop] for name, v in values.items() if v is not None and v.ndim > 0}
    return replace(batch, **cut)


@pytest.fixture(name="make_batch")
def make_batch_fixture() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture(name="take_rows")
def take_rows_fixture() -> Callable[[Batch, int, int], Batch]:
    return take_rows


@pytest.fixture
def slots() -> Callable[..., object]:
    """Build ResponseLogps of the given sums, one slot each, all valid."""
    from nxdt_align.losses.types import ResponseLogps

    def build(sums: Tensor, counts: Tensor | None = None) -> ResponseLogps:
        return ResponseLogps(
            sums=sums,
            counts=torch.ones(len(sums)) if counts is None else counts,
            valid=torch.ones(len(sums), dtype=torch.bool),
            desirable=torch.ones(len(sums), dtype=torch.bool),
            roles=torch.zeros(len(sums), dtype=torch.long),
        )

    return build
