"""A large source in parts of some thousand records, each tokenized by one of several processes and kept in a
file of its own: a preparation that was killed goes on with the parts that are missing.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import multiprocessing
import os
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nxdt_align.data.formats import FORMATS, Format, Kind
from nxdt_align.data.json_files import JsonLine
from nxdt_align.data.open_files import require_room
from nxdt_align.data.raw import RawRecord
from nxdt_align.data.reading import Reader, ReadPart
from nxdt_align.data.records import BadRecord, BadRecords, DataError, Record, content_of
from nxdt_align.data.token_columns import BROKEN, TokenColumns
from nxdt_align.data.tokenize import Encoded, Tokenization
from nxdt_align.files import atomic_file, explain
from nxdt_align.messages import NOTICE
from nxdt_align.record_ids import Array, as_bytes

log = logging.getLogger(__name__)
RECORDS, TEXT = 4096, 2**23
"""A part ends at this many rows, or bytes of JSON lines. Another number is another part: it is in the name of
the folder of parts."""
_TOGETHER, _LETTERS = 512, 2**20
"""Records and characters per call of the tokenizer."""
_MOST_PROCESSES = 32
_SAID_EVERY = 30.0
"""Seconds."""
Row = RawRecord | JsonLine


@dataclass(frozen=True)
class Job:
    """How all parts are made."""

    kind: Kind
    format: Format | None
    columns: dict[str, str]
    tokenization: Tokenization


@dataclass(frozen=True)
class Part:
    """What a part's file says beside its arrays."""

    path: Path
    rows: int
    """Rows that are objects."""
    left_out: int
    texts: int
    unread: Counter[str]
    """Columns that the format does not read."""
    report: BadRecords
    refused: dict[str, BadRecord]
    unread_keys: Counter[str]
    """Keys of messages that the template does not read."""
    as_before: bool
    """Whether the first version of the rules gives all of its records the same tokens."""
    records: int
    """Converted, those included that have no tokens."""
    tokenized: int
    """Of a part without tokens, all that are converted."""

    def array(self, name: str) -> Array:
        """One array: ``all_ids`` (records, 16) and ``good`` (records,), one of TokenColumns, or what else
        its maker has put there."""
        with np.load(self.path, allow_pickle=False) as arrays:
            found: Array = arrays[name]
        return found


class Maker(Protocol):
    """Writes a part's file from a block of rows, in a process of the pool. Raises DataError."""

    def __call__(self, path: Path, block: list[Row], format: Format, job: Job, *more: Any) -> None: ...


def make_parts(
    folder: Path,
    rows: Iterable[Row],
    format: Format,
    job: Job,
    pool: Pool,
    name: str,
    make: Maker | None = None,
    more: Callable[[int], tuple[Any, ...]] = lambda number: (),
) -> Iterator[Part]:
    """The parts of a source in their order, made where ``folder`` does not hold them yet.

    Args:
        make: what makes them; by default ``write_part``.
        more: what it is handed beside each block, by the block's number.

    Raises DataError where the folder cannot be written, or a process is killed.
    """
    which = -1 if job.format is not None else FORMATS[job.kind].index(format)
    waiting: list[Part | Future[Path]] = []
    for number, block in enumerate(blocks(rows)):
        path = folder / f"part-{number:06d}.npz"
        found: Part | Future[Path] | None = _read_part(path)
        if found is None:
            own = more(number)
            # A process that has died meanwhile is told of here, before any part is waited for.
            with _kill_in_words(name):
                found = pool.submit(path, block, which, make or write_part, own)
        waiting.append(found)
        while len(waiting) > pool.most_waiting:
            yield _done(waiting.pop(0), name)
    for each in waiting:
        yield _done(each, name)


def _done(part: Part | Future[Path], name: str) -> Part:
    if isinstance(part, Part):
        return part
    with _kill_in_words(name):
        path = part.result()
    found = _read_part(path)
    if found is None:
        raise DataError(f"{path} cannot be read again; is the disk of data.cache_dir sound?")
    return found


@contextmanager
def _kill_in_words(name: str) -> Iterator[None]:
    """Raises DataError where the block finds that a process of the pool was killed."""
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError(
            f"{name}: a process that tokenizes was killed, probably since the machine's memory is full; what "
            "is done is kept, and the next run goes on from there"
        ) from error


def blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of each part."""
    block: list[Row] = []
    size = 0
    for row in rows:
        block.append(row)
        size += len(row.content) if isinstance(row, JsonLine) else 0
        if len(block) >= RECORDS or size >= TEXT:
            yield block
            block, size = [], 0
    if block:
        yield block


# Processes


class Pool:
    """Processes that make parts, forked when the first part is due."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._executor: ProcessPoolExecutor | None = None
        self._processes = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
        self.most_waiting = 2 * self._processes
        self._said, self._parts = time.monotonic(), 0

    def submit(
        self, path: Path, block: list[Row], which: int, make: Maker, more: tuple[Any, ...]
    ) -> Future[Path]:
        if self._executor is None:
            self._executor = self._start()
        self._parts += 1
        if time.monotonic() - self._said > _SAID_EVERY:
            self._said = time.monotonic()
            log.log(NOTICE, "data: %s rows are being tokenized", f"{self._parts * RECORDS:,}")
        return self._executor.submit(_make_part, path, block, which, make, more)

    def _start(self) -> ProcessPoolExecutor:
        # Forked: nothing is imported or read again, and tokenizer and formats are shared. What is forked
        # runs NumPy and the tokenizer on one thread, and touches no device.
        context = multiprocessing.get_context("fork")
        # Else each fork warns of the threads that it does not have. It stays so: what this process tokenizes
        # itself from now on are small data.
        os.putenv("TOKENIZERS_PARALLELISM", "false")
        executor = ProcessPoolExecutor(
            self._processes, mp_context=context, initializer=_begin, initargs=(self._job, os.getpid())
        )
        return executor

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._executor is not None:
            if error is not None:
                for process in list((self._executor._processes or {}).values()):
                    process.terminate()
            self._executor.shutdown(wait=True, cancel_futures=True)


_job: Job | None = None
"""Of a process of the pool."""


def _begin(job: Job, parent: int) -> None:
    global _job
    _job = job
    # What was made before the fork is not looked at, nor its pages copied, by the garbage collector, which
    # otherwise goes through all objects of a part many times.
    gc.freeze()
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError, AttributeError):
        # prctl(PR_SET_PDEATHSIG): a parent that is killed leaves no process behind.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _make_part(path: Path, block: list[Row], which: int, make: Maker, more: tuple[Any, ...]) -> Path:
    assert _job is not None
    format = _job.format or FORMATS[_job.kind][which]
    make(path, block, format, _job, *more)
    gc.collect()
    return path


# A part


def write_part(path: Path, block: list[Row], format: Format, job: Job) -> None:
    """Convert and tokenize rows into a file. Raises DataError."""
    reader = Reader(job.kind, job.format, job.columns)
    found = reader.convert(block, format)
    write_tokens_of(path, found.records, found, reader.report, job.tokenization)


def write_tokens_of(
    path: Path, wanted: list[Record], found: ReadPart, report: BadRecords, tokenization: Tokenization
) -> None:
    """Tokenize ``wanted`` records into a part's file that tells of the rows of ``found``, whose bad ones are
    in ``report``. Raises DataError."""
    columns: list[TokenColumns] = []
    refused: dict[str, BadRecord] = {}
    unread: Counter[str] = Counter()
    good = np.ones(len(wanted), np.bool_)
    as_before, at = True, 0
    for records in _together(wanted):
        kept: list[tuple[str, Encoded]] = []
        for record, encoded in zip(records, tokenization.encode(records), strict=True):
            if isinstance(encoded, BadRecord):
                report.add(record.source, encoded)
                refused[record.id], good[at] = encoded, False
                as_before = as_before and tokenization.as_before(record)
            else:
                as_before = as_before and encoded.as_before
                kept.append((record.id, encoded))
                unread.update(encoded.unread)
            at += 1
        if kept:
            columns.append(TokenColumns.of([each for each, _ in kept], [each for _, each in kept]))
    about = {
        "refused": {record: [fault.reason, fault.detail] for record, fault in refused.items()},
        "unread_keys": unread,
        "as_before": as_before,
        "records": len(wanted),
        "tokenized": int(good.sum()),
    }
    arrays = _joined(columns) if columns else {}
    arrays |= {"all_ids": as_bytes([record.id for record in wanted]), "good": good}
    write_arrays(path, arrays, found, report, about)


def write_arrays(
    path: Path, arrays: dict[str, Array], found: ReadPart, report: BadRecords, more: dict[str, Any]
) -> None:
    """A part's file, with ``more`` to say than what ``found`` and ``report`` do. Raises DataError."""
    about = {
        "rows": found.rows,
        "left_out": found.left_out,
        "texts": found.texts,
        "unread": found.unread,
        "report": [report.read, report.counts, report.examples],
        **more,
    }
    content = np.frombuffer(json.dumps(about).encode(), np.uint8)
    try:
        with atomic_file(path) as file:
            np.savez(file, **arrays, about=content)  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(
            f"the token cache {path} cannot be written (data.cache_dir): {explain(error)}"
        ) from error


def _together(records: list[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    letters = 0
    for record in records:
        batch.append(record)
        letters += sum(len(content_of(response)) for response in record.responses)
        letters += len(record.prompt) if isinstance(record.prompt, str) else 1000
        if len(batch) >= _TOGETHER or letters >= _LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _joined(columns: list[TokenColumns]) -> dict[str, Array]:
    """The arrays of a part: lengths in the place of offsets, and lengths before truncation of all."""
    names = ("ids", "prompt_tokens", "response_tokens", "truncated", "changed", "prompt_lengths")
    arrays = {
        name: np.concatenate([getattr(each, name) for each in columns])
        for name in (*names, "response_lengths", "last_tokens", "identical")
    }
    arrays["whole_lengths"] = np.concatenate([each.lengths_before_truncation() for each in columns])
    return arrays


def _read_part(path: Path) -> Part | None:
    """None if there is none, or it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        with np.load(path, allow_pickle=False) as arrays:
            about: dict[str, Any] = json.loads(arrays["about"].tobytes())
    except BROKEN as error:
        require_room(error, path)
        return None
    read, counts, examples = about.pop("report")
    refused = {record: BadRecord(*fault) for record, fault in about.pop("refused").items()}
    unread, keys = Counter(about.pop("unread")), Counter(about.pop("unread_keys"))
    report = BadRecords(read, Counter(counts), examples)
    return Part(path, **about, unread=unread, report=report, refused=refused, unread_keys=keys)
