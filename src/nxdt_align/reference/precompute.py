"""The reference pass: every record's reference log-probabilities, before training, without gradients.

The plan of micro-batches follows from the whole data set. One whose records are all stored is skipped; any
other is run in full, planned when its turn comes. So a record is always computed beside the same neighbours
in the same shapes, and a pass that was killed and resumed ends bit-equal to an uninterrupted one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from nxdt_align.batch import Batch, SlotRole
from nxdt_align.engines.base import Engine, together
from nxdt_align.record_ids import Array, distinct, spans
from nxdt_align.reference.cache import ReferenceStore, ReferenceStoreError, name_of, require_finite
from nxdt_align.reference.parts import FloatArray
from nxdt_align.reference.table import find_table

M = TypeVar("M")

Mask = npt.NDArray[np.bool_]

_COLUMN = {SlotRole.CHOSEN: 0, SlotRole.SINGLE: 0, SlotRole.REJECTED: 1, SlotRole.KL: 1}


class Share(NamedTuple):
    """One of the equal shares into which machines divide a pass."""

    number: int = 0
    """From 0."""
    of: int = 1


_WHOLE = Share()


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
    left: int = 0
    """Distinct records without a value, which other shares of the pass compute."""

    def __str__(self) -> str:
        left = f"{self.left} left to other shares, " if self.left else ""
        return (
            f"{self.records} records, {self.computed} computed, {self.reused} from the store, {left}"
            f"{self.duplicates} duplicates, {self.seconds:.1f} s"
        )


@runtime_checkable
class PlanOnDemand(Protocol):
    """Micro-batches that are planned when they are asked for, so that what is stored costs no planning."""

    @property
    def most_records(self) -> int:
        """At least the records of any micro-batch; the same whatever is missing."""

    def __iter__(self) -> Iterator[Any]: ...

    def one_of_each_shape(self) -> Iterator[Any]:
        """The first of each static shape."""

    def needed(self, is_missing: Mask, share: int = 0, shares: int = 1) -> Iterator[Any]:
        """Those of a share with a record that is missing, (N,), whole. A micro-batch is in one share, which
        depends on nothing but the data set."""


@dataclass(frozen=True)
class Plan(Generic[M]):
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

    def needed(self, is_missing: Mask, share: Share = _WHOLE) -> Iterator[tuple[M, list[int]]]:
        """The micro-batches of a share with a record that is missing, (N,), and their records; planned one
        after the other. Raises ValueError where a planned record is out of range."""
        planned: Iterable[M]
        if isinstance(self.micro_batches, PlanOnDemand):
            planned = self.micro_batches.needed(is_missing, *share)
        else:
            planned = self.micro_batches[share.number :: share.of]
        for micro_batch in planned:
            records = [int(r) for r in self.records_of(micro_batch)]
            if any(not 0 <= r < len(is_missing) for r in records):
                raise ValueError(f"a micro-batch has records {records}, but there are {len(is_missing)}")
            if is_missing[records].any():
                yield micro_batch, records


def precompute(
    engine: Engine,
    micro_batches: Sequence[M] | PlanOnDemand,
    collate: Callable[[M], Batch],
    ids: Array,
    store: ReferenceStore,
    *,
    records_of: Callable[[M], Sequence[int]],
    reference: bool = False,
    progress: bool = True,
    flush_every: int = 8192,
    flush_seconds: float = 30.0,
) -> tuple[FloatArray, PassSummary]:
    """All records' reference log-probabilities: (N, width) float32, nats, in data-set order, mapped from the
    store where this rank sees it.

    Every rank calls this with the same plan and makes the same number of engine calls; each ends
    with the same table. Only rank 0 writes to ``store``, at least every ``flush_every`` records and
    ``flush_seconds``, after the current micro-batch, and holds no more of the values.

    Args:
        micro_batches: planned from the whole data set; each distinct record is in at least one.
        collate: makes a micro-batch's tensors, on any rank.
        ids: (N, 16) uint8, content hashes.
        records_of: a micro-batch's records, indices into ``ids``, without making its tensors.
        reference: use the engine's frozen reference instead of its policy.

    Raises:
        ReferenceStoreError: a value is not finite, or the store cannot be read, prepared or completed (on
            every rank), or a part cannot be written meanwhile (rank 0).
        ValueError: a planned record is out of range, or a record is in no micro-batch.
    """
    summary = compute_missing(
        *(engine, micro_batches, collate, ids, store),
        records_of=records_of,
        reference=reference,
        progress=progress,
        flush_every=flush_every,
        flush_seconds=flush_seconds,
    )
    return _shared_table(engine, ids, store), summary


def compute_missing(
    engine: Engine,
    micro_batches: Sequence[M] | PlanOnDemand,
    collate: Callable[[M], Batch],
    ids: Array,
    store: ReferenceStore,
    *,
    records_of: Callable[[M], Sequence[int]],
    reference: bool = False,
    progress: bool = True,
    flush_every: int = 8192,
    flush_seconds: float = 30.0,
    share: Share = _WHOLE,
) -> PassSummary:
    """As ``precompute``, for the micro-batches of a ``share``; values end up in the store alone."""
    started = time.monotonic()
    plan = Plan(micro_batches, collate, records_of)
    known = _Known(engine, ids, store)
    reused, is_first = known.count, engine.topology.rank == 0
    works = not known.is_complete
    bar = _progress_bar(len(known.have), reused, shown=progress and is_first and works)
    ran = 0
    writer = _Writer(store if is_first and works else None, flush_every, flush_seconds)
    if works:
        with together(engine.gather_objects, ReferenceStoreError):
            writer.prepare()
    with bar, writer:
        todo = plan.needed(known.is_missing, share) if works else iter(())
        for owners, values in rounds(engine, plan, todo, store.width, reference):
            fresh_ids, fresh = known.update(owners, values)
            writer.add(fresh_ids, fresh)
            bar.update(len(fresh_ids))
            ran += 1
        if works:
            with together(engine.gather_objects, ReferenceStoreError):
                writer.flush()
    left = len(known.have) - known.count
    if left and share.of == 1:
        at = int((~known.have).argmax())
        raise ValueError(f"{left} records are in no micro-batch, first {name_of(known.id_of(at))}")
    return PassSummary(
        records=len(ids),
        computed=known.count - reused,
        reused=reused,
        duplicates=len(ids) - len(known.have),
        micro_batches=ran,
        seconds=time.monotonic() - started,
        left=left,
    )


class _Known:
    """Which distinct records have a value, the same on every rank: what rank 0's store has, and what has been
    computed since. The first value of a record counts."""

    def __init__(self, engine: Engine, ids: Array, store: ReferenceStore) -> None:
        self._ids = ids
        self._first, self._places = distinct(ids)
        own = None
        with together(engine.gather_objects, ReferenceStoreError):
            if engine.topology.rank == 0:
                own = np.packbits(store.stored(ids)[self._first])
        # All ranks must skip the same micro-batches, or the collectives of rounds would not match.
        bits = engine.broadcast_object(own)
        self.have: Mask = np.unpackbits(bits, count=len(self._first)).astype(np.bool_)

    @property
    def count(self) -> int:
        return int(self.have.sum())

    @property
    def is_complete(self) -> bool:
        return bool(self.have.all())

    @property
    def is_missing(self) -> Mask:
        """(N,) by record, as it is now."""
        return ~(self.have if self._places is None else self.have[self._places])

    def id_of(self, place: int) -> Array:
        found: Array = self._ids[self._first[place]]
        return found

    def update(self, records: Sequence[int], values: FloatArray) -> tuple[Array, FloatArray]:
        """Note the records of these values, (n, width); returns ids and values of the new ones."""
        new: dict[int, int] = {}
        places = records if self._places is None else self._places[list(records)].tolist()
        for at, place in enumerate(places):
            if not self.have[place]:
                new.setdefault(place, at)
        ids, fresh = self._ids[self._first[list(new)]], values[list(new.values())]
        require_finite(ids, fresh)
        self.have[list(new)] = True
        return ids, fresh


def _shared_table(engine: Engine, ids: Array, store: ReferenceStore) -> FloatArray:
    """The whole table on every rank: the file that rank 0 has or makes, or, where another rank does not see
    that, its content."""
    table = None
    with together(engine.gather_objects, ReferenceStoreError):
        if engine.topology.rank == 0:
            table = store.table(ids)
    if table is None:
        table = find_table(store.folder, ids, store.width)
    lacks = table is None
    if not any(engine.gather_objects(lacks)):
        assert table is not None
        return table
    received = np.empty((len(ids), store.width), np.float32) if table is None else table
    for span in spans(len(ids)):
        part = engine.broadcast_object(None if table is None else np.array(table[span]))
        if lacks:
            received[span] = part
    return received


def rounds(
    engine: Engine, plan: Plan[M], todo: Iterator[tuple[M, list[int]]], width: int, reference: bool
) -> Iterator[tuple[list[int], FloatArray]]:
    """Run ``todo`` in lockstep, one micro-batch per data-parallel rank per round.

    Yields records and their values, (n, width), of each micro-batch in ``todo``'s order, on every rank.
    """
    ranks, rank = engine.topology.data_parallel_size, engine.topology.data_parallel_rank
    most = plan.most_records
    while turn := list(islice(todo, ranks)):
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
    valid, owner, role = (t.numpy().ravel() for t in (batch.slot_valid, batch.record_index, batch.slot_role))
    slots = np.flatnonzero(valid)
    owner, column = owner[slots], _columns(role[slots], width)
    wanted, of_record = np.unique(np.asarray(records), return_inverse=True)
    place = np.searchsorted(wanted, owner).clip(max=len(wanted) - 1) * width + column
    if set(owner.tolist()) != set(wanted.tolist()) or len(np.unique(place)) != len(wanted) * width:
        raise ValueError(
            f"a micro-batch of records {wanted.tolist()} was made into slots of "
            f"(record, column) {sorted(zip(owner.tolist(), column.tolist(), strict=True))}"
        )
    values = np.empty(len(wanted) * width, np.float32)
    values[place[::-1]] = logps.ravel()[slots[::-1]]  # of several slots, the first counts
    found: FloatArray = values.reshape(-1, width)[of_record]
    return found


def _columns(roles: Array, width: int) -> Array:
    """The column of the values of slots with these roles."""
    columns = np.array([_COLUMN[SlotRole(role)] for role in range(len(SlotRole))])[roles]
    if (columns >= width).any():
        role = SlotRole(int(roles[columns >= width][0]))
        raise ValueError(f"a {role.name} slot does not fit {width} stored value(s) per record")
    return columns


def trace_shapes(
    engine: Engine,
    micro_batches: Sequence[M] | PlanOnDemand,
    collate: Callable[[M], Batch],
    ids: Array,
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
    plan = Plan(micro_batches, collate, records_of)
    seen: set[Hashable] = set()
    wanted: Iterable[M] = micro_batches
    if isinstance(micro_batches, PlanOnDemand):
        wanted = micro_batches.one_of_each_shape()  # no other micro-batch is made
    for micro_batch in wanted:
        batch = plan.collate(micro_batch)
        shape = _shape(batch)
        if shape not in seen:
            seen.add(shape)
            # cpu() ends the graph, as the transfer of the real pass does.
            engine.response_logps(batch.to(engine.device), reference=reference).cpu()
            _gather(engine, torch.zeros(plan.most_records, store.width))
    # One number for all: no memory per record.
    table = np.broadcast_to(np.zeros(1, np.float32), (len(ids), store.width))
    return table, PassSummary(len(ids), 0, 0, 0, len(seen), time.monotonic() - started)


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

    def prepare(self) -> None:
        if self._store is not None:
            self._store.prepare()

    def flush(self) -> None:
        if self._store is not None:
            self._store.flush()

    def __enter__(self) -> _Writer:
        return self

    def add(self, ids: Array, values: FloatArray) -> None:
        if self._store is None:
            return
        self._store.add(ids, values)
        waited = time.monotonic() - self._flushed
        if self._store.pending >= self._every or waited >= self._seconds:
            self._store.flush()
            self._flushed = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.flush()


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
