"""The door: several sources read, checked and mixed to one list of records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from nxdt_align.data.files import DataError
from nxdt_align.data.formats import Kind, known_columns, named_format
from nxdt_align.data.reading import BadRecords, Reader
from nxdt_align.data.record_types import PairRecord, Record, ResponseRecord, UnpairedRecord, record_id
from nxdt_align.data.values import Message, Prompt

__all__ = [
    "BadRecords",
    "DataError",
    "Kind",
    "Message",
    "PairRecord",
    "Prompt",
    "Record",
    "RecordSet",
    "ResponseRecord",
    "Source",
    "UnpairedRecord",
    "load_records",
    "record_id",
]


@dataclass(frozen=True)
class Source:
    """One file, saved folder or data set id of a mixture.

    ``weight`` is how often each of its records is seen in one epoch: 1 (or None) once, 2 twice, 0.5
    a half of them, drawn by the seed, once; 1.5 all of them and a half again.
    """

    path: str
    weight: float | None = None


@dataclass(frozen=True)
class RecordSet:
    """Records in the sources' order, those of a weighted source repeated or sampled."""

    records: list[Record]
    """All of one kind."""
    report: BadRecords
    format: str
    """The format's name; several, joined by commas, where sources differ."""
    unread: Mapping[str, Sequence[str]]
    """Source -> columns that its format does not read; none where it reads all."""


def load_records(
    sources: Sequence[Source],
    kind: Kind,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_record: Literal["error", "drop"] = "error",
    limit: int | None = None,
    seed: int = 0,
) -> RecordSet:
    """Read, convert and check the records of all sources.

    Args:
        kind: ``pair`` for preference data; ``unpaired`` for a completion with a label;
            ``response`` for one response (of pairs: the chosen one).
        format: a format's name; None finds it by the keys, for each source.
        columns: our key -> the files' key.
        on_bad_record: ``error`` reads to the end and raises with the report of all bad records.
        limit: take the first so many good records of each source, before weights.
        seed: draws the records of a source whose weight is not whole.

    Raises:
        DataError: nothing to read, a broken file, no known format, or bad records as said.
    """
    if not sources:
        raise DataError("no data file is given; set data.train_dir")
    if limit is not None and limit < 1:
        raise DataError(f"data.dev_choose_samples must be at least 1, but is {limit}")
    for source in sources:
        _check_weight(source)
    reader = Reader(kind, named_format(format, kind) if format else None, _checked_columns(columns, kind))
    parts = [reader.read(source.path, limit) for source in sources]
    some_are_good = all(parts)
    if reader.report.total and (on_bad_record == "error" or not some_are_good):
        raise DataError(_bad_records_message(reader.report, some_are_good))
    mixed = chain.from_iterable(
        _weighted(part, source, [seed, i])
        for i, (part, source) in enumerate(zip(parts, sources, strict=True))
    )
    unread = {path: columns for path, columns in reader.unread.items() if columns}
    return RecordSet(list(mixed), reader.report, ", ".join(reader.formats), unread)


def _bad_records_message(report: BadRecords, some_are_good: bool) -> str:
    advice = (
        "mend them, or set data.on_bad_record=drop to train without them"
        if some_are_good
        else "a source has no record that can be used; check data.format and data.columns"
    )
    return f"{report.summary()}\n{advice}"


def _check_weight(source: Source) -> None:
    weight = source.weight
    if weight is not None and not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{source.path}: the weight of a source must be above 0, but is {weight}")


def _weighted(records: list[Record], source: Source, seed: list[int]) -> list[Record]:
    """All records floor(weight) times, then the rest of the weight as a sample without replacement."""
    if source.weight is None or not records:
        return records
    whole, part = divmod(source.weight, 1.0)
    count = round(part * len(records))
    if not whole and not count:
        raise DataError(f"{source.path}: weight {source.weight} of {len(records)} records leaves none")
    drawn = np.random.default_rng(seed).choice(len(records), count, replace=False)
    return records * int(whole) + [records[i] for i in sorted(drawn.tolist())]


def _checked_columns(columns: Mapping[str, str] | None, kind: Kind) -> dict[str, str]:
    known = known_columns(kind)
    for ours in columns or {}:
        if ours not in known:
            raise DataError(f"data.columns: {ours!r} is no key of a format; known are {', '.join(known)}")
    return dict(columns or {})
