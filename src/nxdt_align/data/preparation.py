"""Sources and their files of tokens: which is whose, and making those that are missing. KTO's are of a whole
mixture, see mismatched_parts.py.

Layout of ``data.cache_dir``, beside the stores that small data have, too::

    tokens/tokens-<content>.npz         a source's tokens, named by the contents of its records
    sources/<settings>-<path>.json      what the source was like, and its file of tokens
    sources/<settings>-<path>.rows.npy  the record of each of its examples, where some are equal or unusable
    sources/<settings>-<path>.labels.npy  whether each of its examples is desirable, of labelled completions
    sources/<settings>-<...>.parts/     parts of a source that is being prepared
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from nxdt_align.data.formats import Format, Kind, named_format
from nxdt_align.data.joined_parts import joined
from nxdt_align.data.open_files import make_room, require_room
from nxdt_align.data.reading import Reader, ReadPart, checked_columns, conclude, none_usable_advice
from nxdt_align.data.records import BadRecords, DataError
from nxdt_align.data.source_identity import Stamp
from nxdt_align.data.source_index import BESIDE, VERSION, Renewal, beside, read_index, write_index
from nxdt_align.data.token_columns import BROKEN, TokenColumns, map_tokens, size_and_time
from nxdt_align.data.token_parts import RECORDS, TEXT, Job, Part, Pool, make_parts
from nxdt_align.data.token_sets import cache_path, save_tokens
from nxdt_align.data.tokenize import RULES_VERSION, Tokenization
from nxdt_align.files import atomic_file, explain, one_at_a_time, unless_another
from nxdt_align.messages import NOTICE
from nxdt_align.record_ids import Array, distinct

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How sources are read."""

    kind: Kind
    format: str | None
    columns: Mapping[str, str] | None
    tokenization: Tokenization
    verify: bool
    """Hash sources whole before their stored tokens are used."""

    def digest(self) -> str:
        parts = [VERSION, RULES_VERSION, self.kind, self.format, self.tokenization.fingerprint()]
        text = json.dumps([*parts, sorted((self.columns or {}).items())])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Ready:
    """A source whose tokens are stored."""

    columns: TokenColumns
    rows: Array | None
    """(M,) of each converted record its row of ``columns``, -1 if it has no tokens; None: each its own."""
    about: Mapping[str, Any]
    labels: Array | None = None
    """(M,) bool, of labelled completions."""

    @property
    def report(self) -> BadRecords:
        read, counts, examples = self.about["report"]
        return BadRecords(read, Counter(counts), {reason: list(e) for reason, e in examples.items()})


W = TypeVar("W", bound=Hashable)
"""What one file of tokens is of: the path of a source, or a mixture of several."""


class Preparation(ABC, Generic[W]):
    """Of what is read in one way, in one folder of caches."""

    def __init__(self, settings: Settings, cache_dir: Path) -> None:
        self.settings, self.tokens = settings, cache_dir
        self._folder = cache_dir.parent / "sources"
        self._digest = settings.digest()
        self._lock = self._folder / f"{self._digest}.lock"
        self._renewals: list[Renewal] = []

    @abstractmethod
    def stamp_of(self, what: W) -> Stamp | None:
        """None for what is no file or folder here. Raises OSError."""

    @abstractmethod
    def make_tokens(self, what: W, stamp: Stamp, folder: Path, job: Job, pool: Pool) -> Prepared:
        """Make the parts in ``folder``. Raises DataError."""

    def ready(self, wanted: Sequence[W]) -> dict[W, Ready]:
        """The tokens of each, made where they are not there; by one process at a time."""
        make_room(len(wanted))
        found = {what: self._look_up(what) for what in wanted}
        missing = [what for what, each in found.items() if each is None]
        if missing:
            try:
                with one_at_a_time(self._lock, _say_waiting):
                    self._renew()
                    found |= self._prepare(missing)
            except OSError as error:
                require_room(error, self._folder)
                raise DataError(
                    f"{self._folder} cannot be written (data.cache_dir): {explain(error)}"
                ) from error
        elif self._renewals:
            # Not worth waiting for: another rank does the same, or another run tokenizes.
            with suppress(OSError), unless_another(self._lock) as is_free:
                if is_free:
                    self._renew()
        return {what: each for what, each in found.items() if each is not None}

    def _renew(self) -> None:
        """While no other process writes there."""
        for each in self._renewals:
            each.write()
        self._renewals.clear()

    def _prepare(self, wanted: Sequence[W]) -> dict[W, Ready]:
        settings = self.settings
        named = None if settings.format is None else named_format(settings.format, settings.kind)
        columns = checked_columns(settings.columns, settings.kind)
        job = Job(settings.kind, named, columns, settings.tokenization)
        found: dict[W, Ready] = {}
        with Pool(job) as pool:
            for what in wanted:
                # Another process may have prepared it while this one waited.
                found[what] = self._look_up(what, quiet=True) or self._make(what, job, pool)
        return found

    # What is there

    def _index(self, path: str) -> Path:
        name = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return self._folder / f"{self._digest}-{name}.json"

    def _look_up(self, what: W, quiet: bool = False) -> Ready | None:
        """Its tokens, if they are stored and it is as it was."""
        try:
            stamp = self.stamp_of(what)
        except OSError as error:
            require_room(error, what)
            raise DataError(f"{what} cannot be read: {error.strerror or error}") from error
        if stamp is None:
            return None
        own = self._index(stamp.path)
        about = read_index(own, quiet)
        if about is not None and self._is_same(stamp, about):
            return self._open(own, about, stamp)
        if about is not None and not quiet:
            log.log(NOTICE, "%s has changed since its tokens were stored: tokenizing it again", what)
        # Perhaps it was moved, or is a copy: then all of the content decides.
        other = None if quiet else self._by_sample.get(stamp.sample)
        about = None if other in (None, own) else read_index(other)
        if other is not None and about is not None and about["whole"] == stamp.whole:
            return self._open(other, about, stamp)
        return None

    @cached_property
    def _by_sample(self) -> dict[str, Path]:
        """What leads to each known source, by the sample of its content."""
        found = {
            index: read_index(index, quiet=True)
            for index in sorted(self._folder.glob(f"{self._digest}-*.json"))
        }
        return {about["source"]["sample"]: index for index, about in found.items() if about is not None}

    def _is_same(self, stamp: Stamp, about: Mapping[str, Any]) -> bool:
        then = about["source"]
        if (then["size"], then["sample"]) != (stamp.size, stamp.sample):
            return False
        if then["time"] == stamp.time and not self.settings.verify:
            return True
        return bool(about["whole"] == stamp.whole)

    def _open(self, index: Path, about: Mapping[str, Any], stamp: Stamp) -> Ready | None:
        """What ``index`` leads to, for a source that is now as ``stamp`` says."""
        path = self.tokens / str(about["tokens"])
        try:
            # Before anything is read, as the stamp: what changes meanwhile is not trusted the next time.
            as_found = list(size_and_time(path))
            trusted = as_found == about["tokens_as_written"]
            columns = map_tokens(path, trusted=trusted).columns
            rows, labels = (
                np.load(beside(index, name), mmap_mode="r", allow_pickle=False)
                if about.get(f"{name}_file")
                else None
                for name in BESIDE
            )
            counts = [len(each) for each in (rows, labels) if each is not None]
            if len(columns.ids) != about["distinct"] or any(n != about["records"] for n in counts):
                raise ValueError("it holds another number of records than was written")
            then = about["source"]
            if not trusted or (then["path"], then["time"]) != (stamp.path, stamp.time):
                now = {**about, "source": stamp.as_dict(), "tokens_as_written": as_found}
                self._renewals.append(Renewal(index, about, self._index(stamp.path), now))
            return Ready(columns, rows, about, labels)
        except FileNotFoundError:
            log.log(NOTICE, "the token cache %s is gone: tokenizing again", path)
        except BROKEN as error:
            require_room(error, path)
            log.warning("the token cache %s is broken (%s): tokenizing again", path, error)
        return None

    # Making it

    def _make(self, what: W, job: Job, pool: Pool) -> Ready:
        stamp = self.stamp_of(what)
        if stamp is None:
            raise DataError(f"data file {what} does not exist")
        index = self._index(stamp.path)
        content = hashlib.blake2b(digest_size=8)
        content.update(json.dumps([stamp.as_dict(), RECORDS, TEXT]).encode())
        folder = index.with_suffix(f".{content.hexdigest()}.parts")
        for other in self._folder.glob(f"{index.stem}.*.parts"):
            if other != folder:  # of the source as it was when another preparation was killed
                shutil.rmtree(other, ignore_errors=True)
        log.log(NOTICE, "%s: tokenizing %s bytes of data into %s", what, f"{stamp.size:,}", self.tokens)
        made = self.make_tokens(what, stamp, folder, job, pool)
        if self.stamp_of(what) != stamp:
            raise DataError(f"{what} was changed while it was read; start again when nothing writes to it")
        about = self._write(index, made, stamp)
        shutil.rmtree(folder, ignore_errors=True)
        found = self._open(index, about, stamp)
        if found is None:
            path = self.tokens / str(about["tokens"])
            raise DataError(f"{path} cannot be read again; is the disk of data.cache_dir sound?")
        return found

    def _write(self, index: Path, made: Prepared, stamp: Stamp) -> dict[str, Any]:
        """Join the parts into the file of tokens, and write what leads to it."""
        parts = made.parts
        all_ids = np.concatenate([part.array("all_ids") for part in parts])
        good = np.concatenate([part.array("good") for part in parts])
        first, places = distinct(all_ids)
        as_before = all(part.as_before for part in parts)
        name = cache_path(self.tokens, self.settings.tokenization, as_before, all_ids[first])
        refused = {record: fault for part in parts for record, fault in part.refused.items()}
        unread = sum((part.unread_keys for part in parts), Counter[str]())
        keeps = np.zeros(len(all_ids), np.bool_)
        keeps[first] = good[first]
        if not _holds(name, all_ids[keeps]):
            save_tokens(name, joined(parts, keeps), refused, unread)
        rows = None
        if places is not None or not good.all():
            row_of = np.where(good[first], np.cumsum(good[first]) - 1, -1)
            rows = row_of if places is None else row_of[places]
        rows, labels = made.in_order(rows)
        for kept, what, kind in ((rows, "rows", np.int64), (labels, "labels", np.bool_)):
            if kept is not None:
                with atomic_file(beside(index, what)) as file:
                    np.save(file, kept.astype(kind, copy=False))
        about = {
            "version": VERSION,
            "source": stamp.as_dict(),
            "whole": stamp.whole,
            "tokens": name.name,
            "tokens_as_written": list(size_and_time(name)),
            "rows_file": rows is not None,
            "labels_file": labels is not None,
            "records": len(all_ids) if rows is None else len(rows),
            "distinct": int(keeps.sum()),
            "unread_keys": unread,
            **made.about,
        }
        write_index(index, about)
        return about


@dataclass(frozen=True)
class Prepared:
    """What the tokens are put together from."""

    parts: Sequence[Part]
    about: Mapping[str, Any]
    """What is kept beside them, in JSON's types."""
    examples: Array | None = None
    """(M,) of each example the place of its record among those of the parts; None: each record is one."""
    labels: Array | None = None
    """(M,) bool, of labelled completions."""

    def in_order(self, rows: Array | None) -> tuple[Array | None, Array | None]:
        """Rows of the tokens and labels by example, those included that have no tokens; ``rows``: by record,
        None: each record its own."""
        if self.examples is None:
            return rows, self.labels
        is_all = len(self.examples) == sum(part.records for part in self.parts)
        if rows is None and is_all and (np.diff(self.examples) == 1).all():
            return None, self.labels
        return (self.examples if rows is None else rows[self.examples]), self.labels


def told_of(parts: Sequence[Part], format: Format) -> dict[str, Any]:
    """What a source's parts say of its rows."""
    return {
        "rows": sum(part.rows for part in parts),
        "left_out": sum(part.left_out for part in parts),
        "leaves_out": format.leaves_out,
        "texts": sum(part.texts for part in parts),
        "unread": sum((part.unread for part in parts), Counter[str]()),
    }


class PreparedSources(Preparation[str]):
    """Each source by itself, by its path."""

    def stamp_of(self, what: str) -> Stamp | None:
        return Stamp.of(what)

    def make_tokens(self, what: str, stamp: Stamp, folder: Path, job: Job, pool: Pool) -> Prepared:
        rows, format = Reader(job.kind, job.format, dict(job.columns)).open(what)
        parts = list(make_parts(folder, rows, format, job, pool, what))
        report = merged(part.report for part in parts)
        require_usable(what, parts, report)
        told = {"format": format.name, "report": [report.read, report.counts, report.examples]}
        return Prepared(parts, told_of(parts, format) | told)


def merged(reports: Iterable[BadRecords]) -> BadRecords:
    whole = BadRecords()
    for each in reports:
        whole.merge(each)
    return whole


def require_usable(path: str, parts: Sequence[Part], report: BadRecords) -> None:
    if any(part.tokenized for part in parts):
        return
    if not any(part.records for part in parts):
        part = ReadPart([], Counter(), sum(p.rows for p in parts), sum(p.left_out for p in parts))
        conclude(path, part, 0, "its format leaves out records like these")
        raise DataError(f"{report.summary()}\n{none_usable_advice()}")
    raise DataError(
        f"{report.summary()}\nno record of {path} can be used with this tokenizer and its chat template; use "
        "those of another model, or give prompt and responses as text"
    )


def _holds(path: Path, ids: Array) -> bool:
    """Whether the file is there and holds the tokens of these records."""
    try:
        return map_tokens(path, trusted=False).columns.ids.tobytes() == ids.tobytes()
    except BROKEN as error:
        require_room(error, path)
        return False


def _say_waiting() -> None:
    log.info("another process tokenizes these data: waiting for it")
