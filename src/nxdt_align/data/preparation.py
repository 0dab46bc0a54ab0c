"""Sources and their files of tokens: which is whose, and making those that are missing.

Layout of ``data.cache_dir``, beside the stores that small data have, too::

    tokens/tokens-<content>.npz         a source's tokens, named by the contents of its records
    sources/<settings>-<path>.json      what the source was like, and its file of tokens
    sources/<settings>-<path>.rows.npy  the record of each of its examples, where some are equal or unusable
    sources/<settings>-<...>.parts/     parts of a source that is being prepared
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nxdt_align.data.formats import Kind, named_format
from nxdt_align.data.joined_parts import joined
from nxdt_align.data.reading import NONE_USABLE_ADVICE, Reader, ReadPart, checked_columns, conclude
from nxdt_align.data.records import BadRecords, DataError
from nxdt_align.data.source_identity import Stamp
from nxdt_align.data.token_columns import BROKEN, TokenColumns, map_tokens, size_and_time
from nxdt_align.data.token_parts import RECORDS, TEXT, Job, Part, Pool, make_parts
from nxdt_align.data.token_sets import cache_path, save_tokens
from nxdt_align.data.tokenize import RULES_VERSION, Tokenization
from nxdt_align.files import atomic_file, atomic_write, explain, one_at_a_time
from nxdt_align.messages import NOTICE
from nxdt_align.record_ids import Array, distinct

log = logging.getLogger(__name__)
VERSION = 1
"""Of the files in ``sources``, and of what is read of a source: increment it when a change gives other
records."""


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

    @property
    def report(self) -> BadRecords:
        read, counts, examples = self.about["report"]
        return BadRecords(read, Counter(counts), {reason: list(e) for reason, e in examples.items()})


class Preparation:
    """Of sources that are read in one way, in one folder of caches."""

    def __init__(self, settings: Settings, cache_dir: Path) -> None:
        self._settings, self._tokens = settings, cache_dir
        self._folder = cache_dir.parent / "sources"
        self._digest = settings.digest()

    def ready(self, paths: Sequence[str]) -> dict[str, Ready]:
        """Each source's tokens, made where they are not there; by one process at a time."""
        found = {path: self._look_up(path) for path in paths}
        missing = [path for path, each in found.items() if each is None]
        if missing:
            try:
                with one_at_a_time(self._folder / f"{self._digest}.lock", _say_waiting):
                    found |= self._prepare(missing)
            except OSError as error:
                raise DataError(
                    f"{self._folder} cannot be written (data.cache_dir): {explain(error)}"
                ) from error
        return {path: each for path, each in found.items() if each is not None}

    def _prepare(self, paths: Sequence[str]) -> dict[str, Ready]:
        settings = self._settings
        named = None if settings.format is None else named_format(settings.format, settings.kind)
        columns = checked_columns(settings.columns, settings.kind)
        job = Job(settings.kind, named, columns, settings.tokenization)
        found: dict[str, Ready] = {}
        with Pool(job) as pool:
            for path in paths:
                # Another process may have prepared it while this one waited.
                found[path] = self._look_up(path, quiet=True) or self._make(path, job, pool)
        return found

    # What is there

    def _index(self, path: str) -> Path:
        name = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return self._folder / f"{self._digest}-{name}.json"

    def _look_up(self, path: str, quiet: bool = False) -> Ready | None:
        """The source's tokens, if they are stored and it is as it was."""
        try:
            stamp = Stamp.of(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        if stamp is None:
            return None
        own = self._index(stamp.path)
        about = _read_index(own)
        if about is not None and self._is_same(stamp, about):
            return self._open(own, about)
        if about is not None and not quiet:
            log.log(NOTICE, "%s has changed since its tokens were stored: tokenizing it again", path)
        # Perhaps it was moved, or is a copy: then all of the content decides.
        other = None if quiet else self._by_sample.get(stamp.sample)
        about = None if other in (None, own) else _read_index(other)
        if other is not None and about is not None and about["whole"] == stamp.whole:
            return self._open(other, about)
        return None

    @cached_property
    def _by_sample(self) -> dict[str, Path]:
        """What leads to each known source, by the sample of its content."""
        found = {index: _read_index(index) for index in sorted(self._folder.glob(f"{self._digest}-*.json"))}
        return {about["source"]["sample"]: index for index, about in found.items() if about is not None}

    def _is_same(self, stamp: Stamp, about: Mapping[str, Any]) -> bool:
        then = about["source"]
        if (then["size"], then["sample"]) != (stamp.size, stamp.sample):
            return False
        if then["time"] == stamp.time and not self._settings.verify:
            return True
        return bool(about["whole"] == stamp.whole)

    def _open(self, index: Path, about: Mapping[str, Any]) -> Ready | None:
        path = self._tokens / str(about["tokens"])
        try:
            trusted = list(size_and_time(path)) == about["tokens_as_written"]
            columns = map_tokens(path, trusted=trusted).columns
            rows = None
            if about["rows_file"]:
                rows = np.load(index.with_suffix(".rows.npy"), mmap_mode="r", allow_pickle=False)
            if len(columns.ids) != about["distinct"] or (rows is not None and len(rows) != about["records"]):
                raise ValueError("it holds another number of records than was written")
            return Ready(columns, rows, about)
        except FileNotFoundError:
            log.log(NOTICE, "the token cache %s is gone: tokenizing again", path)
        except BROKEN as error:
            log.warning("the token cache %s is broken (%s): tokenizing again", path, error)
        return None

    # Making it

    def _make(self, path: str, job: Job, pool: Pool) -> Ready:
        stamp = Stamp.of(path)
        if stamp is None:
            raise DataError(f"data file {path} does not exist")
        reader = Reader(job.kind, job.format, dict(job.columns))
        rows, format = reader.open(path)
        index = self._index(stamp.path)
        content = hashlib.blake2b(digest_size=8)
        content.update(json.dumps([stamp.as_dict(), RECORDS, TEXT]).encode())
        folder = index.with_suffix(f".{content.hexdigest()}.parts")
        for other in self._folder.glob(f"{index.stem}.*.parts"):
            if other != folder:  # of the source as it was when another preparation was killed
                shutil.rmtree(other, ignore_errors=True)
        log.log(NOTICE, "%s: tokenizing %s bytes of data into %s", path, f"{stamp.size:,}", self._tokens)
        parts = list(make_parts(folder, rows, format, job, pool, path))
        if Stamp.of(path) != stamp:
            raise DataError(f"{path} was changed while it was read; start again when nothing writes to it")
        report = BadRecords()
        for part in parts:
            report.merge(part.report)
        _require_usable(path, parts, report)
        about = self._write(index, path, parts, report, format.leaves_out, format.name, stamp)
        shutil.rmtree(folder, ignore_errors=True)
        found = self._open(index, about)
        assert found is not None
        return found

    def _write(
        self,
        index: Path,
        path: str,
        parts: Sequence[Part],
        report: BadRecords,
        leaves_out: str,
        format: str,
        stamp: Stamp,
    ) -> dict[str, Any]:
        """Join the parts into the file of tokens, and write what leads to it."""
        all_ids = np.concatenate([part.array("all_ids") for part in parts])
        good = np.concatenate([part.array("good") for part in parts])
        first, places = distinct(all_ids)
        as_before = all(part.as_before for part in parts)
        name = cache_path(self._tokens, self._settings.tokenization, as_before, all_ids[first])
        refused = {record: fault for part in parts for record, fault in part.refused.items()}
        unread = sum((part.unread_keys for part in parts), Counter[str]())
        keeps = np.zeros(len(all_ids), np.bool_)
        keeps[first] = good[first]
        if not _holds(name, all_ids[keeps]):
            save_tokens(name, joined(parts, keeps), refused, unread)
        has_rows = places is not None or not good.all()
        if has_rows:
            row_of = np.where(good[first], np.cumsum(good[first]) - 1, -1)
            rows = row_of if places is None else row_of[places]
            with atomic_file(index.with_suffix(".rows.npy")) as file:
                np.save(file, rows.astype(np.int64))
        about = {
            "version": VERSION,
            "source": stamp.as_dict(),
            "whole": stamp.whole,
            "tokens": name.name,
            "tokens_as_written": list(size_and_time(name)),
            "rows_file": has_rows,
            "records": len(all_ids),
            "distinct": int(keeps.sum()),
            "format": format,
            "rows": sum(part.rows for part in parts),
            "left_out": sum(part.left_out for part in parts),
            "leaves_out": leaves_out,
            "texts": sum(part.texts for part in parts),
            "unread": sum((part.unread for part in parts), Counter[str]()),
            "unread_keys": unread,
            "report": [report.read, report.counts, report.examples],
        }
        atomic_write(index, json.dumps(about, indent=1).encode())
        return about


def _require_usable(path: str, parts: Sequence[Part], report: BadRecords) -> None:
    if any(part.tokenized for part in parts):
        return
    if not any(part.records for part in parts):
        part = ReadPart([], Counter(), sum(p.rows for p in parts), sum(p.left_out for p in parts))
        conclude(path, part, 0, "its format leaves out records like these")
        raise DataError(f"{report.summary()}\n{NONE_USABLE_ADVICE}")
    raise DataError(
        f"{report.summary()}\nno record of {path} can be used with this tokenizer and its chat template; use "
        "those of another model, or give prompt and responses as text"
    )


def _holds(path: Path, ids: Array) -> bool:
    """Whether the file is there and holds the tokens of these records."""
    try:
        return map_tokens(path, trusted=False).columns.ids.tobytes() == ids.tobytes()
    except BROKEN:
        return False


def _read_index(path: Path) -> dict[str, Any] | None:
    """None if there is none of this version, or it is damaged."""
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        return about if about["version"] == VERSION else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("%s is damaged (%s): its source is read again", path, error)
        return None


def _say_waiting() -> None:
    log.info("another process tokenizes these data: waiting for it")
