"""A sample of stored values, computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nxdt_align.batch import Batch
from nxdt_align.engines.base import Engine, together
from nxdt_align.record_ids import Array, distinct
from nxdt_align.reference.cache import ReferenceStore, ReferenceStoreError, name_of
from nxdt_align.reference.parts import FloatArray
from nxdt_align.reference.precompute import M, Mask, Plan, PlanOnDemand, rounds
from nxdt_align.reference.table import find_table


@dataclass(frozen=True)
class Verified:
    """How stored values compare with those that the model gives now."""

    records: int
    """Distinct ones of the data set."""
    missing: int
    """Of these, without a value."""
    compared: int
    worst: float
    """The largest difference, in nats per token; infinite where a value is not finite."""
    worst_record: str | None
    """Its id; None where none was compared."""


def verify(
    engine: Engine,
    micro_batches: Sequence[M] | PlanOnDemand,
    collate: Callable[[M], Batch],
    ids: Array,
    store: ReferenceStore,
    *,
    records_of: Callable[[M], Sequence[int]],
    tokens: Array,
    sample: int,
    reference: bool = False,
    seed: int = 0,
) -> Verified:
    """Compute about ``sample`` of the stored values again, as the pass does, and compare. Collective; only
    rank 0 reads ``store``.

    Args:
        tokens: (N, width) tokens of each response.

    The other arguments are those of ``precompute``.
    """
    plan = Plan(micro_batches, collate, records_of)
    first, _ = distinct(ids)
    is_first = engine.topology.rank == 0
    drawn = None
    with together(engine.gather_objects, ReferenceStoreError):
        if is_first:
            drawn = _drawn(store.stored(ids), first, sample, plan.most_records, seed)
    wanted, missing = engine.broadcast_object(drawn)
    owners: list[int] = []
    values: list[FloatArray] = []
    for records, found in rounds(engine, plan, plan.needed(wanted), store.width, reference):
        owners += records
        values.append(found)
    own = None
    with together(engine.gather_objects, ReferenceStoreError):
        if is_first:
            own = _compared(store, ids, owners, values, tokens)
    compared, worst, worst_record = engine.broadcast_object(own)
    return Verified(len(first), missing, compared, worst, worst_record)


def _drawn(stored: Mask, first: Array, sample: int, most_records: int, seed: int) -> tuple[Mask, int]:
    """(N,) marks records whose micro-batches hold about ``sample`` records; and how many have no value."""
    is_there = stored[first]
    known = first[is_there]
    count = min(len(known), max(1, -(-sample // max(most_records, 1))))
    wanted = np.zeros(len(stored), np.bool_)
    wanted[np.random.default_rng(seed).choice(known, count, replace=False)] = True
    return wanted, int((~is_there).sum())


def _compared(
    store: ReferenceStore, ids: Array, owners: list[int], values: list[FloatArray], tokens: Array
) -> tuple[int, float, str | None]:
    """Of the records that have a value: their number, the largest difference, whose it is."""
    if not owners:
        return 0, 0.0, None
    records = np.array(owners)
    kept, _ = distinct(ids[records])
    records, now = records[kept], np.concatenate(values)[kept]
    then = store.values_of(ids[records])
    if np.isnan(then).any() and (table := find_table(store.folder, ids, store.width)) is not None:
        then = np.where(np.isnan(then), table[records], then)  # of a part that is gone: training reads this
    is_there = ~np.isnan(then[:, 0])
    difference = np.abs(now - then)[is_there] / np.maximum(tokens[records][is_there], 1)
    worst = np.where(np.isfinite(difference), difference, np.inf).max(1)
    at = int(worst.argmax())
    return len(worst), float(worst[at]), name_of(ids[records[is_there][at]])
