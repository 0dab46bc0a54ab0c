"""Reads, checks and mixes several sources into one list of records.

Detects the format, checks every row, and counts the bad ones by reason.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from nxdt_align.data.formats import (
    FORMAT_KEY,
    Format,
    Kind,
    describe_formats,
    detect_format,
    known_columns,
    named_format,
    nearest_format,
    read_columns,
)
from nxdt_align.data.json_files import JsonLine
from nxdt_align.data.raw import RawRecord
from nxdt_align.data.records import (
    BAD_RECORDS_ADVICE,
    BadRecord,
    BadRecords,
    DataError,
    OnBadRecord,
    Record,
    Row,
    as_tools,
    content_of,
    excerpt,
    further_keys,
)
from nxdt_align.data.sources import parsed, read_unparsed
from nxdt_align.messages import NOTICE

log = logging.getLogger(__name__)
PARTS_OF_A_PROMPT = frozenset(
    (
        *("system", "system_prompt", "system_message", "instruction", "instructions", "input", "question"),
        *("query", "context", "history", "documents", "tools", "functions"),
        *("images", "image", "videos", "audios"),
    )
)
"""Columns that probably belong to the prompt: not reading one of them is worth a warning."""
ROWS_TO_DETECT = 100
"""Number of rows to search for the first that fits a format."""


@dataclass(frozen=True)
class Source:
    """One file, saved folder or data set id of a mixture.

    ``weight`` is how often each record occurs per epoch: 1 (or None) once, 2 twice, 0.5 a random half of them
    once, 1.5 all of them plus a random half.
    """

    path: str
    weight: float | None = None


@dataclass(frozen=True)
class RecordSet:
    """Records in the sources' order; those of a weighted source are repeated or sampled."""

    records: list[Record]
    """All of one kind."""
    report: BadRecords
    format: str
    """The format's name; several, joined by commas, if sources differ."""
    unread: Mapping[str, Mapping[str, int]]
    """Source -> columns that its format does not read, each with the number of rows where it is not empty;
    sources without such columns are left out."""


@dataclass
class ReadPart:
    """What some of a source's rows hold."""

    records: list[Record]
    unread: Counter[str]
    """Columns that the format does not read, each with the number of rows that fill it."""
    rows: int = 0
    """Rows that are objects."""
    left_out: int = 0
    """Rows that give no record without being bad."""
    texts: int = 0
    """Records whose prompt is text, not chat messages."""


def load_records(
    sources: Sequence[Source],
    kind: Kind,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_record: OnBadRecord | None = None,
    limit: int | None = None,
    seed: int = 0,
    format_key: str = FORMAT_KEY,
) -> RecordSet:
    """Read, convert and check the records of all sources.

    Args:
        kind: ``pair`` for preference data; ``unpaired`` for a completion with a label;
            ``response`` for one response (of pairs: the chosen one); ``prompt`` for prompts alone, of records
            with responses or without.
        format: a format's name; None detects it from the keys, for each source.
        columns: our key -> the files' key.
        on_bad_record: ``error`` reads to the end and raises with the report of all bad records; None, of
            verbs that have no such setting, does, too, and advises no setting.
        limit: take the first N good records of each source, before weights.
        seed: for sampling a source whose weight is not an integer.
        format_key: what the user names the format with, for messages.

    Raises:
        DataError: nothing to read, a broken file, no known format, or bad records (see ``on_bad_record``).
    """
    if not sources:
        raise DataError("no data file is given; set data.train_dir")
    if limit is not None and limit < 1:
        raise DataError(f"data.dev_choose_samples must be at least 1, but is {limit}")
    for source in sources:
        check_weight(source)
    named = named_format(format, kind, format_key) if format else None
    reader = Reader(kind, named, checked_columns(columns, kind), format_key)
    parts = [reader.read(source.path, limit) for source in sources]
    some_are_good = all(parts)
    if reader.report.total and (on_bad_record != "drop" or not some_are_good):
        advice = BAD_RECORDS_ADVICE if on_bad_record else "fix them, or leave them out"
        advice = advice if some_are_good else none_usable_advice(format_key)
        raise DataError(f"{reader.report.summary()}\n{advice}")
    mixed = chain.from_iterable(
        _weighted(part, source, [seed, i])
        for i, (part, source) in enumerate(zip(parts, sources, strict=True))
    )
    unread = {path: counts for path, counts in reader.unread.items() if counts}
    for path, counts in unread.items():
        tell_unread(path, counts, format_key)
    return RecordSet(list(mixed), reader.report, ", ".join(reader.formats), unread)


def check_weight(source: Source) -> None:
    weight = source.weight
    if weight is not None and not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{source.path}: the weight of a source must be above 0, but is {weight}")


def _weighted(records: list[Record], source: Source, seed: list[int]) -> list[Record]:
    rows = weighted_rows(len(records), source, seed)
    return records if rows is None else [records[i] for i in rows.tolist()]


def weighted_rows(count: int, source: Source, seed: list[int]) -> npt.NDArray[Any] | None:
    """Indices of all ``count`` records floor(weight) times, then the rest of the weight as a sample without
    replacement; None: each once."""
    if source.weight is None or source.weight == 1 or not count:
        return None
    whole, part = divmod(source.weight, 1.0)
    sampled = round(part * count)
    if not whole and not sampled:
        raise DataError(f"{source.path}: weight {source.weight} of {count} records leaves none")
    drawn = np.random.default_rng(seed).choice(count, sampled, replace=False)
    return np.concatenate([np.tile(np.arange(count), int(whole)), np.sort(drawn)])


def checked_columns(columns: Mapping[str, str] | None, kind: Kind) -> dict[str, str]:
    known = known_columns(kind)
    for ours in columns or {}:
        if ours not in known:
            raise DataError(
                f"data.columns: {ours!r} is not a key of any format; known are {', '.join(known)}"
            )
    return dict(columns or {})


class Reader:
    """Reads sources one after another into one report."""

    def __init__(
        self, kind: Kind, format: Format | None, columns: dict[str, str], format_key: str = FORMAT_KEY
    ) -> None:
        self._kind, self._format_key = kind, format_key
        self._format = format
        self._columns = columns
        self.report = BadRecords()
        self.formats: dict[str, None] = {}
        self.unread: dict[str, Counter[str]] = {}
        """Source -> columns that its format does not read, each with the number of rows that fill it."""

    def read(self, path: str, limit: int | None) -> list[Record]:
        """The good records of a source, at most ``limit``. Raises DataError if its format is unknown."""
        rows, format = self.open(path)
        part = self.convert(rows, format, limit)
        conclude(path, part, len(part.records), format.leaves_out, self._format_key)
        # A mixture may name a file twice.
        self.unread[path] = part.unread
        return part.records

    def open(self, path: str) -> tuple[Iterator[RawRecord | JsonLine], Format]:
        """The rows of a source, and the format of the first that fits one."""
        rows = read_unparsed(path)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{path} holds no records; name a file with at least one")
        rows = chain([first], rows)
        head, format = self._detect(rows, path)
        return chain(head, rows), format

    def convert(
        self, rows: Iterable[RawRecord | JsonLine], format: Format, limit: int | None = None
    ) -> ReadPart:
        """The good records of some of a source's rows; bad ones go into the report."""
        part = ReadPart([], Counter())
        known = read_columns(format, self._kind)
        for row in map(parsed, rows):
            if not self._is_sound(row):
                continue
            part.rows += 1
            converted = self._convert(row, format, known)
            part.left_out += not converted
            good = [record for each in converted for record in self._check(each, row.place)]
            part.records += good
            # Most files have no other columns: what comes next is for those that do.
            if known is not None and not (renamed := self._renamed(row.value)).keys() <= known:
                read = {*known, "tools"} if any(record.tools for record in good) else known
                part.unread.update(key for key in renamed if key not in read and _is_filled(renamed[key]))
            if limit is not None and len(part.records) >= limit:
                del part.records[limit:]
                break
        part.texts = sum(isinstance(record.prompt, str) for record in part.records)
        return part

    def _is_sound(self, row: RawRecord) -> bool:
        """Whether a row is an object; one that is not goes into the report."""
        fault = _fault_of_row(row)
        if fault is not None:
            self.report.read += 1
            self.report.add(row.place, fault)
        return fault is None

    def _detect(
        self, rows: Iterator[RawRecord | JsonLine], path: str
    ) -> tuple[list[RawRecord | JsonLine], Format]:
        """The rows read so far, and the format of the first that fits one."""
        head: list[RawRecord | JsonLine] = []
        sound: list[RawRecord] = []
        format = self._format
        while format is None and len(sound) < ROWS_TO_DETECT:
            row = next(rows, None)
            if row is None:
                break
            head.append(row)
            found = parsed(row)
            if _fault_of_row(found) is None:
                sound.append(found)
                format = detect_format(self._renamed(found.value), self._kind)
        if format is None:
            for row in head:
                self._is_sound(parsed(row))
            raise DataError(self._no_format(path, sound))
        self.formats[format.name] = None
        return head, format

    def _no_format(self, path: str, head: list[RawRecord]) -> str:
        if not head:
            return f"{path} holds no usable record; name another file\n{self.report.summary()}"
        row = self._renamed(head[0].value)
        nearest = nearest_format(row, self._kind)
        hint = ""
        if nearest is not None:
            format, missing = nearest
            hint = f"; nearest is {format.name}, which needs {', '.join(missing)} too"
        if all(isinstance(row.get(key), str) for key in ("chosen", "rejected")):
            named = _set_to(self._format_key, "common_beginning")
            hint += f". Where both texts begin with the prompt, set {named}"
        rename = "with data.columns" if self._format_key == FORMAT_KEY else "in the file"
        return (
            f"{head[0].place}: the record's keys ({_listed(row)}) fit no known format{hint}. Rename columns "
            f"{rename}, or name the format in {self._format_key}. Known are: {describe_formats(self._kind)}"
        )

    def _renamed(self, row: Row) -> Row:
        """The row under our names; a mapped column loses its own name."""
        if not self._columns:
            return row
        theirs = set(self._columns.values())
        kept = {key: value for key, value in row.items() if key not in theirs and key not in self._columns}
        return kept | {ours: row.get(column) for ours, column in self._columns.items()}

    def _convert(
        self, row: RawRecord, format: Format, known: frozenset[str] | None
    ) -> Sequence[Record | BadRecord]:
        """The row's records and faults; none if the format leaves it out. ``known`` are the columns that the
        format reads; where they are known, the column ``tools`` goes with chat messages, too."""
        try:
            renamed = self._renamed(row.value)
            if known is not None:
                self._refuse_half_of_alpaca(row.value, known)
            converted = format.convert(renamed)
            if known is None or not _is_filled(renamed.get("tools")):
                return converted
            tools = as_tools(renamed["tools"])
            return [
                each
                if isinstance(each, BadRecord) or isinstance(each.prompt, str)
                else replace(each, tools=tools)
                for each in converted
            ]
        except BadRecord as fault:
            return [self._in_their_words(fault)]

    def _refuse_half_of_alpaca(self, row: Row, known: frozenset[str]) -> None:
        """Alpaca's ``instruction`` and ``input`` are one prompt: neither is trained on without the other, as
        it would be where ``data.columns`` or ``data.format`` names but one."""
        if "instruction" not in row or "input" not in row:
            return
        filled = [column for column in ("instruction", "input") if _is_filled(row[column])]
        lost = [column for column in filled if not self._is_read(column, known)]
        if len(filled) == 2 and len(lost) == 1:
            (read,) = set(filled) - set(lost)
            raise BadRecord(
                "instruction beside input",
                f"`{lost[0]}` is {excerpt(row[lost[0]])} beside `{read}` and would not be read; set "
                f"{_set_to(self._format_key, 'alpaca')} to join them"
                + (", and leave both out of data.columns" if self._columns else ""),
            )

    def _is_read(self, column: str, known: frozenset[str]) -> bool:
        """Whether the file's column is read, under its own name or the one that data.columns gives it."""
        names = [ours for ours, theirs in self._columns.items() if theirs == column]
        return any(name in known for name in names or [column] if names or column not in self._columns)

    def _in_their_words(self, fault: BadRecord) -> BadRecord:
        """Name the file's column beside our key."""
        detail = fault.detail
        for ours, column in self._columns.items():
            detail = detail.replace(f"`{ours}`", f"`{ours}` (column `{column}`)")
        return BadRecord(fault.reason, detail)

    def _check(self, converted: Record | BadRecord, place: str) -> Iterator[Record]:
        self.report.read += 1
        fault = converted if isinstance(converted, BadRecord) else _fault_of(converted)
        if isinstance(converted, Record) and fault is None:
            # What dataclasses.replace does in twice the time.
            prompt, responses, label = converted.prompt, converted.responses, converted.label
            yield Record(prompt, responses, label, place, converted.tools)
        elif fault is not None:
            self.report.add(place, fault)


def _fault_of_row(row: RawRecord) -> BadRecord | None:
    if row.fault is not None:
        return row.fault
    # The first is a comparison, the second a search through Python's abstract classes.
    if type(row.value) is not dict and not isinstance(row.value, Mapping):
        kind = type(row.value).__name__
        return BadRecord("wrong type", f"a record must be an object, but is {kind} {excerpt(row.value)}")
    return _fault_of_keys(row.value)


def _fault_of_keys(row: Row) -> BadRecord | None:
    """JSON can hold lone surrogates, which no log or tokenizer takes; values are checked as text."""
    for key in row:
        if key.isascii():
            continue
        try:
            key.encode()
        except UnicodeEncodeError:
            return BadRecord("not UTF-8", f"a key is {excerpt(key)}")
    return None


def _set_to(key: str, value: str) -> str:
    """As the user writes it: a setting of the YAML, or an option."""
    return f"{key}{'=' if key == FORMAT_KEY else ' '}{value}"


def none_usable_advice(format_key: str = FORMAT_KEY) -> str:
    where = "data.format and data.columns" if format_key == FORMAT_KEY else format_key
    return f"a source has no usable record; check {where}"


def tell_unread(path: str, counts: Mapping[str, int], format_key: str = FORMAT_KEY) -> None:
    listed = _listed([f"{column} ({rows})" for column, rows in counts.items()])
    said = "%s: columns that are not read, with the number of records that have them: %s"
    log.log(NOTICE, said, path, listed)
    for column in counts:
        if column.lower() in PARTS_OF_A_PROMPT:
            log.warning(
                "%s: `%s`, which %d records have, is not read, though it is probably a part of the prompt: "
                "join it with the prompt in the file, or in a function named by %s",
                *(path, column, counts[column], format_key),
            )


def conclude(path: str, part: ReadPart, good: int, leaves_out: str, format_key: str = FORMAT_KEY) -> None:
    """Say what a whole source with ``good`` records was like. Raises DataError where its format leaves out
    all of it."""
    if part.left_out:
        told = f"{path}: {part.left_out} of {part.rows} records are left out: {leaves_out}"
        if part.left_out == part.rows:
            raise DataError(f"{told}; name a function in {format_key} to take them otherwise")
        log.log(NOTICE, "%s", told)
    if 0 < part.texts < good:
        log.warning(
            "%s: the prompts of %d records are text, those of %d are chat messages, and only the latter go "
            "through the chat template: give all of them in one form",
            *(path, part.texts, good - part.texts),
        )


_LISTED, _NAME = 20, 60


def _listed(names: Collection[str]) -> str:
    """Names of columns for a message, whatever a file calls its columns and however many there are."""
    shown = [name if name.isprintable() and len(name) <= _NAME else excerpt(name) for name in names]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return (", ".join(shown[:_LISTED]) or "none") + more


def _is_filled(value: object) -> bool:
    """Whether a column says anything: Arrow writes nulls, and others empty values, where a row has none."""
    if value is None:
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) if isinstance(value, list | Mapping) else True


def _fault_of(record: Record) -> BadRecord | None:
    """The fault of a converted record, for any format."""
    prompt = record.prompt
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        return BadRecord("empty prompt", f"the prompt is {prompt!r}")
    names = ("chosen response", "rejected response") if len(record.responses) == 2 else ("response",)
    for name, response in zip(names, record.responses, strict=False):  # a prompt may have none
        text = content_of(response)
        # Whether further keys say something is the chat template's to tell: see Tokenization.
        if not text.strip() and not further_keys(response):
            return BadRecord("empty response", f"the {name} to {excerpt(prompt)} is {text!r}")
    if len(record.responses) == 2 and record.responses[0] == record.responses[1]:
        return BadRecord("chosen equal to rejected", excerpt(record.responses[0]))
    return None
