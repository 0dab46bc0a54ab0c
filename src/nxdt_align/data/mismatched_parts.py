"""Large sources of labelled completions, each beside a mismatched one, prepared as one mixture: which record
gets whose completion depends on all of them in their order.

The sources are read twice, in the same blocks: first for what tells prompts and completions apart, a few
bytes per record, from which the pairing follows; then each block is tokenized with the completions that it
gets, of which those of other blocks are handed to it. There are at most a few of these per block, see
``mismatched``, so that no process holds the texts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nxdt_align.data.formats import Format
from nxdt_align.data.mismatched import NoCandidateError, digest_of, mismatched, no_candidate
from nxdt_align.data.preparation import Preparation, Prepared, merged, require_usable, told_of
from nxdt_align.data.reading import Reader, Source, weighted_rows
from nxdt_align.data.records import DataError, Record, Response
from nxdt_align.data.source_identity import Stamp
from nxdt_align.data.token_parts import (
    Job,
    Part,
    Pool,
    Row,
    blocks,
    make_parts,
    write_arrays,
    write_tokens_of,
)
from nxdt_align.record_ids import Array, distinct


@dataclass(frozen=True)
class Mixture:
    """Sources in their order, with their weights."""

    sources: tuple[Source, ...]
    seed: int
    """Draws the records of a source whose weight is not an integer."""

    @property
    def paths(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(source.path for source in self.sources))

    def __str__(self) -> str:
        return ", ".join(self.paths)


@dataclass(frozen=True)
class MixtureStamp(Stamp):
    """Of all sources of a mixture together."""

    parts: tuple[Stamp, ...] = ()

    @classmethod
    def of_all(cls, mixture: Mixture) -> MixtureStamp | None:
        """None where a source is no file or folder here. Raises OSError."""
        found = {path: Stamp.of(path) for path in mixture.paths}
        parts = [stamp for stamp in found.values() if stamp is not None]
        if len(parts) < len(found):
            return None
        place = {path: number for number, path in enumerate(found)}
        drawn = json.dumps([[[place[s.path], s.weight] for s in mixture.sources], mixture.seed])
        return cls(
            json.dumps([drawn, *(os.path.abspath(part.path) for part in parts)]),
            sum(part.size for part in parts),
            max(part.time for part in parts),
            _digest([drawn, *(part.sample for part in parts)]),
            tuple(parts),
        )

    @cached_property
    def whole(self) -> str:
        return _digest([part.whole for part in self.parts])


def _digest(texts: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=16).hexdigest()


class PreparedMixture(Preparation[Mixture]):
    """A mixture of labelled completions, each beside its mismatched one."""

    def stamp_of(self, what: Mixture) -> Stamp | None:
        return MixtureStamp.of_all(what)

    def make_tokens(self, what: Mixture, stamp: Stamp, folder: Path, job: Job, pool: Pool) -> Prepared:
        read = [
            _Read(path, folder / f"{number}", job, pool, Reader(job.kind, job.format, dict(job.columns)))
            for number, path in enumerate(what.paths)
        ]
        pairing = _Pairing(what, read)
        parts = [each.tokenized(pairing) for each in read]
        by_path = dict(zip(what.paths, zip(read, parts, strict=True), strict=True))
        for path, (_, made) in by_path.items():
            require_usable(path, made, merged(part.report for part in made))
        report = merged(part.report for source in what.sources for part in by_path[source.path][1])
        told = {
            path: told_of(made, source.format) | {"records": source.records}
            for path, (source, made) in by_path.items()
        }
        about = {"sources": told, "report": [report.read, report.counts, report.examples]}
        return Prepared(list(chain.from_iterable(parts)), about, pairing.examples, pairing.labels)


class _Read:
    """A source whose prompts and completions are told apart: what is kept of each block."""

    def __init__(self, path: str, folder: Path, job: Job, pool: Pool, reader: Reader) -> None:
        self.path = path
        self._folder, self._job, self._pool = folder, job, pool
        rows, self.format = reader.open(path)
        make = (folder / "completions", rows, self.format, job, pool, path)
        self.parts = list(make_parts(*make, write_completions))
        require_usable(path, self.parts, merged(part.report for part in self.parts))
        self.counts = np.array([part.records for part in self.parts])
        self.records = int(self.counts.sum())
        self.start = 0
        """Its first record among those of all sources."""

    def array(self, name: str) -> Array:
        return np.concatenate([part.array(name) for part in self.parts])

    def records_at(self, places: Array) -> Iterator[tuple[int, Record]]:
        """Some records, by ascending places in the source, without holding the others."""
        ends = np.cumsum(self.counts)
        wanted: dict[int, list[int]] = {}
        for place in places.tolist():
            wanted.setdefault(int(np.searchsorted(ends, place, "right")), []).append(place)
        reader = Reader(self._job.kind, self._job.format, dict(self._job.columns))
        for number, block in enumerate(blocks(self._rows())):
            row_of = self.parts[number].array("row_of") if number in wanted else np.zeros(0)
            for place in wanted.get(number, ()):
                own = place - int(ends[number] - self.counts[number])
                row = int(row_of[own])
                of_row = reader.convert([block[row]], self.format).records
                yield place, of_row[own - int(np.searchsorted(row_of, row))]

    def _rows(self) -> Iterator[Row]:
        return Reader(self._job.kind, self._job.format, dict(self._job.columns)).open(self.path)[0]

    def tokenized(self, pairing: _Pairing) -> list[Part]:
        make = (self._folder / "tokens", self._rows(), self.format, self._job, self._pool, self.path)
        starts = self.start + np.cumsum([0, *self.counts])

        def more(number: int) -> tuple[Any, ...]:
            return pairing.of_records(int(starts[number]), int(starts[number + 1]))

        return list(make_parts(*make, write_mismatched, more))


class _Pairing:
    """Which record gets whose completion, counted over the records of all sources."""

    def __init__(self, mixture: Mixture, read: Sequence[_Read]) -> None:
        of_path: dict[str, _Read] = {}
        start = 0
        for each in read:
            each.start, start = start, start + each.records
            of_path[each.path] = each
        order = np.concatenate(
            [
                of_path[source.path].start + _chosen(of_path[source.path].records, source, [mixture.seed, at])
                for at, source in enumerate(mixture.sources)
            ]
        )
        codes = [_codes(np.concatenate([r.array(name) for r in read])) for name in ("prompts", "completions")]
        try:
            got = order[mismatched(codes[0][order], codes[1][order])]
        except NoCandidateError as error:
            ((_, first),) = _records_at(read, order[error.position : error.position + 1])
            raise DataError(no_candidate(first.source)) from error
        self.labels: Array = np.concatenate([r.array("labels") for r in read])[order]
        pairs, self.examples = np.unique(order * start + got, return_inverse=True)
        """(M,) of each example the place of its pair, which are in the order of the records."""
        self._own, self._got = np.divmod(pairs, start)
        self._others = self._of_other_blocks(read)

    def _of_other_blocks(self, read: Sequence[_Read]) -> dict[int, Response]:
        ends = np.cumsum(np.concatenate([r.counts for r in read]))
        own, got = (np.searchsorted(ends, each, "right") for each in (self._own, self._got))
        wanted = np.unique(self._got[own != got])
        return {place: record.responses[0] for place, record in _records_at(read, wanted)}

    def of_records(self, begin: int, end: int) -> tuple[Array, Array, dict[int, Response]]:
        """Of the pairs of the records from ``begin`` up to ``end``: each record, and the one whose completion
        it gets, counted from ``begin``; and the completions of those that are not among them."""
        first, last = np.searchsorted(self._own, [begin, end]).tolist()
        own, got = self._own[first:last] - begin, self._got[first:last] - begin
        others = np.unique(got[(got < 0) | (got >= end - begin)]).tolist()
        return own, got, {place: self._others[place + begin] for place in others}


def _chosen(count: int, source: Source, seed: list[int]) -> Array:
    chosen = weighted_rows(count, source, seed)
    return np.arange(count) if chosen is None else chosen


def _codes(digests: Array) -> Array:
    """(N,) numbers that are equal where digests, (N, 16), are."""
    first, places = distinct(digests)
    return first if places is None else places


def _records_at(read: Sequence[_Read], places: Array) -> Iterator[tuple[int, Record]]:
    for each in read:
        own = places[(places >= each.start) & (places < each.start + each.records)] - each.start
        if len(own):
            yield from ((each.start + place, record) for place, record in each.records_at(own))


# Parts, by processes of the pool


def write_completions(path: Path, block: list[Row], format: Format, job: Job) -> None:
    """What tells prompts and completions of a block apart."""
    reader = Reader(job.kind, job.format, job.columns)
    found = reader.convert(block, format)
    number_of = {row.place: number for number, row in enumerate(block)}
    records = found.records
    arrays = {
        "prompts": _digests([digest_of(r.prompt) for r in records]),
        "completions": _digests([digest_of(r.responses[0]) for r in records]),
        "labels": np.array([r.label is not False for r in records], np.bool_),
        "row_of": np.array([number_of[r.source] for r in records], np.int32),
    }
    about = {"records": len(records), "tokenized": len(records)}
    more = {"refused": {}, "unread_keys": {}, "as_before": True}
    write_arrays(path, arrays, found, reader.report, about | more)


def _digests(digests: list[bytes]) -> Array:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def write_mismatched(
    path: Path,
    block: list[Row],
    format: Format,
    job: Job,
    own: Array,
    got: Array,
    others: Mapping[int, Response],
) -> None:
    """The tokens of a block's records, each beside the completion that it gets; see
    ``_Pairing.of_records``."""
    reader = Reader(job.kind, job.format, job.columns)
    found = reader.convert(block, format)
    records, pairs = found.records, []
    for mine, place in zip(own.tolist(), got.tolist(), strict=True):
        other = others[place] if place in others else records[place].responses[0]
        pairs.append(replace(records[mine], responses=(*records[mine].responses, other)))
    write_tokens_of(path, pairs, found, reader.report, job.tokenization)
