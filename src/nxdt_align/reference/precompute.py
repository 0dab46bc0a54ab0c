"""The reference pass: every record's reference log-probabilities, before training, without gradients.

The micro-batches are planned once from the whole data set. One whose records are all stored is skipped; any
other is run in full. So a record is always computed beside the same neighbours in the same shapes, and a pass
that was killed and resumed ends bit-equal to an uninterrupted one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from nxdt_align.batch import Batch, SlotRole
from nxdt_align.engines.base import Engine
from nxdt_align.reference.cache import FloatArray, ReferenceStore, require_finite

M = TypeVar("M")

_COLUMN = {SlotRole.CHOSEN: 0, SlotRole.SINGLE: 0, SlotRole.REJECTED: 1, SlotRole.KL: 1}


@dataclass(frozen=True)
class PassSummary:
    """Summary of a reference pass, in distinct records except for ``records``."""

    records: int
    """The data set's length."""
    computed: int
    reused: int
    """Distinct records whose values were in the store."""
    duplicates: int
    """Records with the content of an earlier one; they share its value."""
    micro_batches: int
    """Micro-batches run, over all data-parallel ranks."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.records} records, {self.computed} computed, {self.reused} from the store, "
            f"{self.duplicates} duplicates, {self.seconds:.1f} s"
        )


@runtime_checkable
class PlanOnDemand(Protocol):
    """Micro-batches that are planned when they are asked for, so that what is stored costs no planning."""

    @property
    def most_records(self) -> int:
        """At least the records of any micro-batch; the same whatever is missing."""

    def __iter__(self) -> Iterator[Any]: ...

    def needed(self, is_missing: npt.NDArray[np.bool_]) -> Iterator[Any]:
        """Those with a record that is missing, (N,), whole."""


@dataclass(frozen=True)
class _Plan(Generic[M]):
    """The planned micro-batches of a data set, the same on every rank."""

    micro_batches: Sequence[M] | PlanOnDemand
    collate: Callable[[M], Batch]
    records_of: Callable[[M], Sequence[int]]

    @property
    def most_records(self) -> int:
        """Maximum records per micro-batch: the static size of the gathered tensor."""
        if isinstance(self.micro_batches, PlanOnDemand):
            return self.micro_batches.most_records
        return max((len(self.records_of(m)) for m in self.micro_batches), default=0)


def precompute(
    engine: Engine,
    micro_batches: Sequence[M] | PlanOnDemand,
    collate: Callable[[M], Batch],
    record_ids: Sequence[str],
    store: ReferenceStore,
    *,
    records_of: Callable[[M], Sequence[int]],
    reference: bool = False,
    progress: bool = True,
    flush_every: int = 8192,
    flush_seconds: float = 30.0,
) -> tuple[FloatArray, PassSummary]:
    """All records' reference log-probabilities: (N, width) float32, nats, in data-set order.

    Every rank calls this with the same plan and makes the same number of engine calls; each ends
    with the same table. Only rank 0 uses ``store``, and it writes at least every ``flush_every``
    records and ``flush_seconds``, after the current micro-batch.

    Args:
        micro_batches: planned from the whole data set; each distinct record is in at least one.
        collate: makes a micro-batch's tensors, on any rank.
        record_ids: (N,) content hashes, 32 hex digits each.
        records_of: a micro-batch's records, indices into ``record_ids``, without making its tensors.
        reference: use the engine's frozen reference instead of its policy.

    Raises:
        ReferenceStoreError: a value is not finite (on every rank), or cannot be written (rank 0).
        ValueError: a planned record is out of range, or a record is in no micro-batch.
    """
    started = time.monotonic()
    plan = _Plan(micro_batches, collate, records_of)
    known = _Known(record_ids, store.width)
    todo = _agree(engine, plan, known, store)
    reused, is_first = known.count, engine.topology.rank == 0
    bar = _progress_bar(len(known.ids), reused, shown=progress and is_first and bool(todo))
    with bar, _Writer(store if is_first and todo else None, flush_every, flush_seconds) as writer:
        for owners, values in _rounds(engine, plan, todo, store.width, reference):
            ids, fresh = known.update(owners, values)
            writer.add(ids, fresh)
            bar.update(len(ids))
    summary = PassSummary(
        records=len(record_ids),
        computed=known.count - reused,
        reused=reused,
        duplicates=len(record_ids) - len(known.ids),
        micro_batches=len(todo),
        seconds=time.monotonic() - started,
    )
    return known.table(), summary


class _Known:
    """Values by distinct record, the same on every rank. The first value of a record wins."""

    def __init__(self, record_ids: Sequence[str], width: int) -> None:
        first: dict[str, int] = {}
        self.distinct = np.array([first.setdefault(r, len(first)) for r in record_ids], np.int64)
        """(N,) index of each record's distinct record."""
        self.ids = list(first)
        self.values: FloatArray = np.zeros((len(first), width), np.float32)
        self.have: npt.NDArray[np.bool_] = np.zeros(len(first), np.bool_)

    @property
    def count(self) -> int:
        return int(self.have.sum())

    def read(self, store: ReferenceStore) -> None:
        self.have[:] = True
        self.have[store.missing(self.ids)] = False
        present = np.flatnonzero(self.have)
        self.values[present] = store.table([self.ids[i] for i in present])

    def update(self, records: Sequence[int], values: FloatArray) -> tuple[list[str], FloatArray]:
        """Add the values, (n, width), of n records; returns ids and values of the new ones."""
        new: dict[int, int] = {}
        for at, distinct in enumerate(self.distinct[list(records)].tolist()):
            if not self.have[distinct]:
                new.setdefault(distinct, at)
        ids = [self.ids[distinct] for distinct in new]
        fresh = values[list(new.values())]
        require_finite(ids, fresh)
        self.values[list(new)] = fresh
        self.have[list(new)] = True
        return ids, fresh

    def table(self) -> FloatArray:
        if not self.have.all():
            at = int((~self.have).argmax())
            raise ValueError(f"{int((~self.have).sum())} records are in no micro-batch, first {self.ids[at]}")
        table: FloatArray = self.values[self.distinct]
        return table


def _agree(engine: Engine, plan: _Plan[M], known: _Known, store: ReferenceStore) -> list[tuple[M, list[int]]]:
    """The micro-batches to run, with their records; fills ``known``. Both follow rank 0's store."""
    if engine.topology.rank == 0:
        known.read(store)
    # All ranks must skip the same micro-batches, or the collectives of _rounds would not match.
    known.values, known.have = engine.broadcast_object((known.values, known.have))
    todo = []
    planned = plan.micro_batches
    if isinstance(planned, PlanOnDemand):
        planned = list(planned.needed(~known.have[known.distinct]))
    for micro_batch in planned:
        records = [int(r) for r in plan.records_of(micro_batch)]
        if any(not 0 <= r < len(known.distinct) for r in records):
            raise ValueError(f"a micro-batch has records {records}, but there are {len(known.distinct)}")
        if not known.have[known.distinct[records]].all():
            todo.append((micro_batch, records))
    return todo


def _rounds(
    engine: Engine, plan: _Plan[M], todo: Sequence[tuple[M, list[int]]], width: int, reference: bool
) -> Iterator[tuple[list[int], FloatArray]]:
    """Run ``todo`` in lockstep, one micro-batch per data-parallel rank per round.

    Yields records and their values, (n, width), of each micro-batch in ``todo``'s order, on every rank.
    """
    ranks, rank = engine.topology.data_parallel_size, engine.topology.data_parallel_rank
    most = plan.most_records
    for start in range(0, len(todo), ranks):
        turn = todo[start : start + ranks]
        # A rank without work in the last round repeats another's, since every rank must join the collectives;
        # zip below drops the result.
        micro_batch, records = turn[min(rank, len(turn) - 1)]
        mine = np.zeros((most, width), np.float32)
        mine[: len(records)] = _values(engine, plan.collate(micro_batch), records, width, reference)
        gathered = _gather(engine, torch.from_numpy(mine))
        for (_, owners), values in zip(turn, gathered, strict=False):
            yield owners, values[: len(owners)]


def _gather(engine: Engine, mine: Tensor) -> FloatArray:
    """(ranks, most, width): every data-parallel rank's values."""
    if engine.topology.data_parallel_size == 1:
        return mine.numpy()[None]
    gathered: FloatArray = engine.all_gather(mine.to(engine.device)).cpu().numpy()
    return gathered


def _values(engine: Engine, batch: Batch, records: Sequence[int], width: int, reference: bool) -> FloatArray:
    """(n, width) float32: the engine's log-probabilities, by record and role."""
    logps = engine.response_logps(batch.to(engine.device), reference=reference).float().cpu().numpy()
    places: dict[tuple[int, int], float] = {}
    valid, owner, role = (
        t.reshape(-1).tolist() for t in (batch.slot_valid, batch.record_index, batch.slot_role)
    )
    for at in np.flatnonzero(valid).tolist():
        places.setdefault((owner[at], _column(role[at], width)), logps.reshape(-1)[at])
    wanted = {(record, column) for record in records for column in range(width)}
    if set(places) != wanted:
        raise ValueError(
            f"a micro-batch of records {sorted(set(records))} was made into slots of "
            f"(record, column) {sorted(places)}"
        )
    result = np.empty((len(records), width), np.float32)
    for at, record in enumerate(records):
        result[at] = [places[record, column] for column in range(width)]
    return result


def _column(role: int, width: int) -> int:
    column = _COLUMN.get(SlotRole(role))
    if column is None or column >= width:
        raise ValueError(f"a {SlotRole(role).name} slot does not fit {width} stored value(s) per record")
    return column


def trace_shapes(
    engine: Engine,
    micro_batches: Sequence[M] | PlanOnDemand,
    collate: Callable[[M], Batch],
    record_ids: Sequence[str],
    store: ReferenceStore,
    *,
    records_of: Callable[[M], Sequence[int]],
    reference: bool = False,
) -> tuple[FloatArray, PassSummary]:
    """``precompute`` for graph extraction (``COMPILE=1``): runs one micro-batch of each static shape, returns
    zeros.

    Every rank runs the same graphs as in the real pass; nothing is read or written, and no value is used,
    since extracted graphs are not executed.
    """
    started = time.monotonic()
    plan = _Plan(micro_batches, collate, records_of)
    seen: set[Hashable] = set()
    for micro_batch in plan.micro_batches:
        batch = plan.collate(micro_batch)
        shape = _shape(batch)
        if shape not in seen:
            seen.add(shape)
            # cpu() ends the graph, as the transfer of the real pass does.
            engine.response_logps(batch.to(engine.device), reference=reference).cpu()
            _gather(engine, torch.zeros(plan.most_records, store.width))
    table = np.zeros((len(record_ids), store.width), np.float32)
    return table, PassSummary(len(record_ids), 0, 0, 0, len(seen), time.monotonic() - started)


def _shape(batch: Batch) -> Hashable:
    return tuple(batch.input_ids.shape), batch.labels.shape[1], batch.slot_valid.shape[1]


class _Writer:
    """Adds values to the store and flushes often enough that a killed pass loses little.

    Also flushes on exit, even after an error.
    """

    def __init__(self, store: ReferenceStore | None, flush_every: int, flush_seconds: float) -> None:
        self._store = store
        self._every, self._seconds = flush_every, flush_seconds
        self._flushed = time.monotonic()

    def __enter__(self) -> _Writer:
        if self._store is not None:
            self._store.prepare()
        return self

    def add(self, ids: Sequence[str], values: FloatArray) -> None:
        if self._store is None:
            return
        self._store.add(ids, values)
        waited = time.monotonic() - self._flushed
        if self._store.pending >= self._every or waited >= self._seconds:
            self._store.flush()
            self._flushed = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._store is not None:
            self._store.flush()


def _progress_bar(total: int, done: int, *, shown: bool) -> Any:
    """Redrawn on a terminal; elsewhere a line every half minute, of a pass that takes longer."""
    seldom = {} if sys.stderr.isatty() else {"delay": 30.0, "mininterval": 30.0, "leave": False}
    return tqdm(
        total=total,
        initial=done,
        desc="Reference log-probs",
        unit=" records",
        dynamic_ncols=True,
        disable=not shown,
        **seldom,
    )
