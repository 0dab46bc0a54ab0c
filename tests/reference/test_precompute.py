"""The reference pass: every record its own value, however often the pass is broken off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import Exchange, FakeEngine, MicroBatch, collate, plan, record_ids, records_of

from nxdt_align.batch import Batch
from nxdt_align.reference.cache import ReferenceStore, ReferenceStoreError
from nxdt_align.reference.precompute import PassSummary, Share, compute_missing, precompute, trace_shapes

COUNT = 20
REPO = Path(__file__).parents[2]


def store_at(root: Path, **options: Any) -> ReferenceStore:
    return ReferenceStore(root, "0f" * 16, options.pop("width", 2), **options)


def run(
    engine: FakeEngine, store: ReferenceStore, micro_batches: list[MicroBatch] | None = None, **options: Any
) -> tuple[np.ndarray, PassSummary]:
    options = {"records_of": records_of, "progress": False, "flush_every": 1, **options}
    return precompute(
        engine,
        plan(COUNT) if micro_batches is None else micro_batches,
        options.pop("collate", collate),
        options.pop("ids", record_ids(COUNT)),
        store,
        **options,
    )


def expected(record: int, row: tuple[int, ...]) -> list[float]:
    """FakeEngine's formula: -(record + 1) - role / 4 - 1e-3 * sum over the row's slots of (record + 1).
    Empty slots hold 0."""
    trace = np.float32(sum(2 * (r + 1) for r in row)) * np.float32(1e-3)
    return [-(record + 1) - role / 4 - float(trace) for role in (0, 1)]


@pytest.fixture
def whole(tmp_path: Path) -> np.ndarray:
    """The table of an uninterrupted pass."""
    return run(FakeEngine(), store_at(tmp_path / "whole"))[0]


def test_every_record_gets_its_own_values(tmp_path: Path) -> None:
    table, summary = run(FakeEngine(), store_at(tmp_path), reference=True)
    rows = {r: row for micro_batch in plan(COUNT) for row in micro_batch for r in row}
    np.testing.assert_allclose(table, [expected(r, rows[r]) for r in range(COUNT)], rtol=1e-6)
    assert table.dtype == np.float32 and table.shape == (COUNT, 2)
    assert (summary.records, summary.computed, summary.reused, summary.micro_batches) == (20, 20, 0, 4)


def test_which_model_is_asked(tmp_path: Path) -> None:
    policy, frozen = FakeEngine(), FakeEngine()
    run(policy, store_at(tmp_path / "a"))
    run(frozen, store_at(tmp_path / "b"), reference=True)
    assert not any(policy.asked_reference) and all(frozen.asked_reference)


def test_single_responses(tmp_path: Path) -> None:
    table, _ = run(FakeEngine(), store_at(tmp_path, width=1), collate=partial(collate, width=1))
    assert table.shape == (COUNT, 1) and np.argsort(-table[:, 0]).tolist() == list(range(COUNT))


def test_second_pass_computes_nothing(tmp_path: Path, whole: np.ndarray) -> None:
    run(FakeEngine(), store_at(tmp_path))
    engine = FakeEngine()
    table, summary = run(engine, store_at(tmp_path))
    assert engine.calls == [] and (summary.computed, summary.reused) == (0, COUNT)
    np.testing.assert_array_equal(table, whole)


def test_order_of_the_data_set_does_not_matter(tmp_path: Path, whole: np.ndarray) -> None:
    run(FakeEngine(), store_at(tmp_path))
    backwards, _ = run(FakeEngine(), store_at(tmp_path), ids=record_ids(COUNT)[::-1])
    np.testing.assert_array_equal(backwards, whole[::-1])


@pytest.mark.parametrize("calls", range(5))
@pytest.mark.parametrize("flush_every", [1, 10**6])
def test_resumed_pass_is_bit_equal(tmp_path: Path, whole: np.ndarray, calls: int, flush_every: int) -> None:
    """Broken off after each number of micro-batches; what was computed is kept, also unflushed."""
    if calls < 4:
        with pytest.raises(RuntimeError, match="went away"):
            run(FakeEngine(fail_after=calls), store_at(tmp_path), flush_every=flush_every)
    engine = FakeEngine()
    table, summary = run(engine, store_at(tmp_path))
    np.testing.assert_array_equal(table, whole)
    if calls < 4:
        assert len(engine.calls) == 4 - calls and summary.reused == min(6 * calls, COUNT)


def test_partly_known_micro_batch_is_run_whole(tmp_path: Path, whole: np.ndarray) -> None:
    """A record of its own row would get other bits: so the row is run as planned, and the value that
    was stored first stays."""
    store = store_at(tmp_path)
    store.add(record_ids(1), [[-7.0, -8.0]])
    engine = FakeEngine()
    table, summary = run(engine, store)
    np.testing.assert_array_equal(table[1:], whole[1:])
    np.testing.assert_array_equal(table[0], [-7.0, -8.0])
    assert (summary.computed, summary.reused, len(engine.calls)) == (19, 1, 4)
    np.testing.assert_array_equal(store_at(tmp_path).table(record_ids(COUNT)), table)


KILLED = """
import sys, threading
from pathlib import Path
from fake_engine import FakeEngine, collate, plan, record_ids, records_of
from nxdt_align.reference.cache import ReferenceStore
from nxdt_align.reference.precompute import precompute
class Stuck(FakeEngine):
    def response_logps(self, batch, *, reference=False):
        if len(self.calls) == 3:
            print("the fourth micro-batch", flush=True)
            threading.Event().wait()
        return super().response_logps(batch, reference=reference)
store = ReferenceStore(Path(sys.argv[1]), "0f" * 16, 2)
precompute(Stuck(), plan(20), collate, record_ids(20), store, records_of=records_of, flush_every=1)
"""


def test_sigkill_in_the_middle(tmp_path: Path, whole: np.ndarray) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{REPO / 'src'}:{REPO / 'tests' / 'support'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "the fourth micro-batch\n"
    process.kill()
    assert process.wait() == -9
    table, summary = run(FakeEngine(), store_at(tmp_path))
    np.testing.assert_array_equal(table, whole)
    assert 0 < summary.computed < COUNT and summary.reused >= 12


def test_damaged_part_is_computed_again(tmp_path: Path, whole: np.ndarray) -> None:
    run(FakeEngine(), store_at(tmp_path))
    shutil.rmtree(next(tmp_path.glob("0f*/tables")))
    first = min(tmp_path.glob("0f*/part-*"))
    first.write_bytes(first.read_bytes()[:-1])
    engine = FakeEngine()
    with pytest.warns(UserWarning, match="damaged"):
        table, summary = run(engine, store_at(tmp_path))
    np.testing.assert_array_equal(table, whole)
    assert (len(engine.calls), summary.computed, summary.reused) == (1, 6, 14)


def test_other_fingerprint_is_computed_again(tmp_path: Path) -> None:
    run(FakeEngine(), store_at(tmp_path))
    engine = FakeEngine()
    run(engine, ReferenceStore(tmp_path, "ab" * 16, 2))
    assert len(engine.calls) == 4


@pytest.mark.parametrize("broken_off", [False, True])
def test_duplicates_share_the_first_value(tmp_path: Path, broken_off: bool) -> None:
    ids = record_ids(COUNT)
    ids[1] = ids[0]  # in one row
    ids[15] = ids[4]  # in another micro-batch
    whole, summary = run(FakeEngine(), store_at(tmp_path / "whole"), ids=ids)
    assert (summary.duplicates, summary.computed) == (2, 18)
    np.testing.assert_array_equal(whole[1], whole[0])
    np.testing.assert_array_equal(whole[15], whole[4])
    assert int(whole[4, 0]) == -5
    if broken_off:
        with pytest.raises(RuntimeError):
            run(FakeEngine(fail_after=2), store_at(tmp_path), ids=ids)
        np.testing.assert_array_equal(run(FakeEngine(), store_at(tmp_path), ids=ids)[0], whole)


def test_plan_with_each_distinct_record_once(tmp_path: Path) -> None:
    """A plan may leave duplicates out: they take the value of the record that is in it."""
    ids = np.concatenate([record_ids(6), record_ids(6)])
    table, summary = run(FakeEngine(), store_at(tmp_path), plan(6), ids=ids)
    np.testing.assert_array_equal(table[6:], table[:6])
    assert summary.duplicates == 6


# Data parallel


def in_ranks(
    ranks: int, work: Callable[[FakeEngine], Any], **options: Any
) -> tuple[list[Any], list[FakeEngine]]:
    exchange = Exchange(ranks)
    engines = [FakeEngine(rank, ranks, exchange, **options) for rank in range(ranks)]
    results: list[Any] = [None] * ranks

    def body(rank: int) -> None:
        try:
            results[rank] = work(engines[rank])
        except Exception as error:
            results[rank] = error
            if not isinstance(error, ReferenceStoreError):
                exchange.barrier.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for another"
    return results, engines


@pytest.mark.parametrize("fails", ["stored", "prepare", "flush", "table"])
def test_an_error_of_the_store_is_every_ranks(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others would wait for rank 0 until their collective's time is out."""

    def refuse(*_: Any) -> Any:
        raise ReferenceStoreError("cannot write: the disk is full")

    monkeypatch.setattr(ReferenceStore, fails, refuse)
    results, _ = in_ranks(2, lambda engine: run(engine, store_at(tmp_path), flush_every=10**6))
    assert [type(each) for each in results] == [ReferenceStoreError] * 2
    assert [str(each) for each in results] == ["cannot write: the disk is full"] * 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_is_in_lockstep_and_equal(tmp_path: Path, whole: np.ndarray, ranks: int) -> None:
    """4 micro-batches on 3 ranks: two rounds; in the last, two ranks run one for nothing."""

    def work(engine: FakeEngine) -> tuple[np.ndarray, PassSummary]:
        # Each rank sees a folder of its own: only rank 0's counts.
        return run(engine, store_at(tmp_path / str(engine.topology.rank)))

    results, engines = in_ranks(ranks, work)
    for table, summary in results:
        np.testing.assert_array_equal(table, whole)
        assert summary.computed == COUNT
    assert [len(e.calls) for e in engines] == [2] * ranks
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "whole") == ["0"]
    np.testing.assert_array_equal(store_at(tmp_path / "0").table(record_ids(COUNT)), whole)


def test_data_parallel_resume_at_another_size(tmp_path: Path, whole: np.ndarray) -> None:
    with pytest.raises(RuntimeError):
        run(FakeEngine(fail_after=1), store_at(tmp_path))
    results, engines = in_ranks(2, lambda e: run(e, store_at(tmp_path, read_only=e.topology.rank > 0)))
    for table, summary in results:
        np.testing.assert_array_equal(table, whole)
        assert (summary.reused, summary.computed) == (6, 14)
    assert [len(e.calls) for e in engines] == [2, 2]


def test_value_that_is_not_finite_stops_every_rank(tmp_path: Path) -> None:
    results, _ = in_ranks(2, lambda e: run(e, store_at(tmp_path, read_only=e.topology.rank > 0)), poison=8)
    for error in results:
        assert isinstance(error, ReferenceStoreError) and f"record {8:032x}" in str(error)
    assert store_at(tmp_path).missing(record_ids(COUNT)).tolist() == list(range(6, COUNT))


def test_ranks_that_see_the_store_map_it(tmp_path: Path, whole: np.ndarray) -> None:
    """Of the values, no rank holds more than what is not written yet."""
    flushed: list[int] = []

    class Watched(ReferenceStore):
        def flush(self) -> None:
            flushed.append(self.pending)
            super().flush()

    def work(engine: FakeEngine) -> tuple[np.ndarray, PassSummary]:
        return run(engine, Watched(tmp_path, "0f" * 16, 2, read_only=engine.topology.rank > 0))

    results, _ = in_ranks(2, work)
    for table, _summary in results:
        assert isinstance(table, np.memmap)
        np.testing.assert_array_equal(table, whole)
    assert max(flushed) <= 6 and sum(flushed) == COUNT


def test_plans_are_made_as_the_pass_goes_on(tmp_path: Path) -> None:
    """A broken-off pass has planned no micro-batch that it did not come to."""
    planned: list[MicroBatch] = []

    class Planner:
        most_records = 6

        def __iter__(self) -> Iterator[MicroBatch]:
            return iter(plan(COUNT))

        def one_of_each_shape(self) -> Iterator[MicroBatch]:
            return iter(plan(COUNT)[:1])

        def needed(self, is_missing: np.ndarray, share: int = 0, shares: int = 1) -> Iterator[MicroBatch]:
            for micro_batch in plan(COUNT)[share::shares]:
                planned.append(micro_batch)
                yield micro_batch

    with pytest.raises(RuntimeError, match="went away"):
        run(FakeEngine(fail_after=1), store_at(tmp_path), Planner())  # type: ignore[arg-type]
    assert len(planned) == 2
    assert run(FakeEngine(), store_at(tmp_path), Planner())[1].reused == 6  # type: ignore[arg-type]
    made: list[MicroBatch] = []

    def noted(micro_batch: MicroBatch) -> Batch:
        made.append(micro_batch)
        return collate(micro_batch)

    trace_shapes(FakeEngine(), Planner(), noted, record_ids(COUNT), store_at(tmp_path), records_of=records_of)
    assert made == plan(COUNT)[:1]


# Shares


def test_shares_of_several_machines_are_the_whole_pass(tmp_path: Path, whole: np.ndarray) -> None:
    """Bit for bit: a share runs micro-batches of the whole data set's plan."""

    def share(index: int, of: int, where: str) -> tuple[FakeEngine, PassSummary]:
        engine, store = FakeEngine(), store_at(tmp_path / where)
        arguments = (plan(COUNT), collate, record_ids(COUNT), store)
        return engine, compute_missing(
            engine, *arguments, records_of=records_of, share=Share(index, of), progress=False
        )

    done = [share(i, 3, "shared") for i in range(3)]
    assert [len(engine.calls) for engine, _ in done] == [2, 1, 1]
    assert [summary.left for _, summary in done] == [12, 6, 0]
    assert "12 left to other shares" in str(done[0][1])
    table, summary = run(FakeEngine(), store_at(tmp_path / "shared"))
    np.testing.assert_array_equal(table, whole)
    assert summary.computed == 0
    engine, summary = share(1, 3, "shared")
    assert engine.calls == [] and summary.left == 0


# Flushing, dry run, faults


def test_flush_by_count_and_time(tmp_path: Path) -> None:
    run(FakeEngine(), store_at(tmp_path / "count"), flush_every=12)
    assert len(list(tmp_path.glob("count/*/part-*"))) == 2
    run(FakeEngine(), store_at(tmp_path / "end"), flush_every=10**6)
    assert len(list(tmp_path.glob("end/*/part-*"))) == 1
    run(FakeEngine(), store_at(tmp_path / "time"), flush_every=10**6, flush_seconds=0.0)
    assert len(list(tmp_path.glob("time/*/part-*"))) == 4


def test_unwritable_store_stops_before_the_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = FakeEngine()
    with pytest.raises(ReferenceStoreError, match="cannot write"):
        run(engine, store_at(tmp_path / "file"))
    assert engine.calls == []


def trace(
    engine: FakeEngine, store: ReferenceStore, micro_batches: list[MicroBatch]
) -> tuple[np.ndarray, PassSummary]:
    return trace_shapes(engine, micro_batches, collate, record_ids(COUNT), store, records_of=records_of)


def test_dry_run_runs_each_shape_once_and_writes_nothing(tmp_path: Path) -> None:
    micro_batches = [*plan(12), *plan(12, rows=1)]
    engine = FakeEngine()
    table, _ = trace(engine, store_at(tmp_path), micro_batches)
    assert [tuple(c.shape) for c in engine.calls] == [(2, 6), (1, 6)]
    np.testing.assert_array_equal(table, np.zeros((COUNT, 2), np.float32))
    assert list(tmp_path.iterdir()) == []


def test_dry_run_is_in_lockstep_and_ignores_values(tmp_path: Path, whole: np.ndarray) -> None:
    results, engines = in_ranks(2, lambda e: trace(e, store_at(tmp_path), plan(COUNT)), poison=0)
    assert [len(e.calls) for e in engines] == [1, 1] and not results[0][0].any()
    np.testing.assert_array_equal(run(FakeEngine(), store_at(tmp_path))[0], whole)


def test_record_in_no_micro_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"8 records are in no micro-batch, first {12:032x}"):
        run(FakeEngine(), store_at(tmp_path), plan(12))


def test_record_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 20"):
        run(FakeEngine(), store_at(tmp_path), plan(21))


def test_collate_that_disagrees_with_the_plan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was made into slots"):
        run(FakeEngine(), store_at(tmp_path), collate=lambda m: collate(plan(COUNT)[1]))


def test_progress_bar_counts_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run(FakeEngine(), store_at(tmp_path), progress=True)
    shown = capsys.readouterr().err
    assert "Reference log-probs" in shown and "20/20" in shown and "records/s" in shown
    run(FakeEngine(), store_at(tmp_path), progress=True)
    assert capsys.readouterr().err == ""
