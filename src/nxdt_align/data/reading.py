"""Rows of a source to records: the format found, every row checked, the bad ones counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from nxdt_align.data.files import BadRecord, DataError, RawRecord, excerpt, read_raw
from nxdt_align.data.formats import (
    Draft,
    Format,
    Kind,
    describe_formats,
    detect_format,
    nearest_format,
    unread_columns,
)
from nxdt_align.data.record_types import Record, to_record
from nxdt_align.data.values import Row

EXAMPLES_PER_REASON = 3
ROWS_TO_DETECT = 100
"""How many rows may come before the first that fits a format."""


@dataclass
class BadRecords:
    """Records that could not be used, by reason, out of ``read`` that were looked at."""

    read: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason, ``file:line: detail``."""

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, place: str, fault: BadRecord) -> None:
        self.counts[fault.reason] += 1
        shown = self.examples.setdefault(fault.reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            shown.append(f"{place}: {fault.detail}")

    def summary(self) -> str:
        """A paragraph: how many of how many, and for each reason its count and first places."""
        lines = [f"{self.total} bad of {self.read} records"]
        for reason, count in self.counts.most_common():
            lines.append(f"  {reason}: {count}")
            lines += [f"    {example}" for example in self.examples[reason]]
            if count > len(self.examples[reason]):
                lines.append(f"    and {count - len(self.examples[reason])} more")
        return "\n".join(lines)


class Reader:
    """Reads sources one after the other into one report."""

    def __init__(self, kind: Kind, format: Format | None, columns: dict[str, str]) -> None:
        self._kind = kind
        self._format = format
        self._columns = columns
        self.report = BadRecords()
        self.formats: dict[str, None] = {}
        self.unread: dict[str, list[str]] = {}
        """Source -> columns of its first row that its format does not read."""

    def read(self, path: str, limit: int | None) -> list[Record]:
        """The good records of a source, at most ``limit``. Raises DataError where none can be made."""
        rows = self._sound_rows(path)
        head, format = self._detect(rows, path)
        records: list[Record] = []
        for row in chain(head, rows):
            if path not in self.unread:
                self.unread[path] = unread_columns(self._renamed(row.value), format, self._kind)
            records += self._convert(row, format)
            if limit is not None and len(records) >= limit:
                return records[:limit]
        return records

    def _sound_rows(self, path: str) -> Iterator[RawRecord]:
        """Rows that are objects; others go into the report. Raises DataError where there is no row."""
        empty = True
        for row in read_raw(path):
            empty = False
            fault = row.fault
            if fault is None and not isinstance(row.value, Mapping):
                kind = type(row.value).__name__
                fault = BadRecord(
                    "wrong type", f"a record must be an object, but is {kind} {excerpt(row.value)}"
                )
            if fault is None:
                yield row
            else:
                self.report.read += 1
                self.report.add(row.place, fault)
        if empty:
            raise DataError(f"{path} holds no records; name a file with at least one")

    def _detect(self, rows: Iterator[RawRecord], path: str) -> tuple[list[RawRecord], Format]:
        """The rows looked at, and the format of the first that fits one."""
        head: list[RawRecord] = []
        format = self._format
        while format is None and len(head) < ROWS_TO_DETECT:
            row = next(rows, None)
            if row is None:
                break
            head.append(row)
            format = detect_format(self._renamed(row.value), self._kind)
        if format is None:
            raise DataError(self._no_format(path, head))
        self.formats[format.name] = None
        return head, format

    def _no_format(self, path: str, head: list[RawRecord]) -> str:
        if not head:
            return f"{path} holds no usable record\n{self.report.summary()}"
        row = self._renamed(head[0].value)
        nearest, missing = nearest_format(row, self._kind)
        return (
            f"{head[0].place}: the record's keys ({', '.join(map(str, row)) or 'none'}) fit no known format; "
            f"nearest is {nearest}, which needs {', '.join(missing)} too. Rename columns with data.columns, "
            f"or name the format in data.format. Known are: {describe_formats(self._kind)}"
        )

    def _renamed(self, row: Row) -> Row:
        """The row under our names; a mapped column does not keep its own."""
        if not self._columns:
            return row
        theirs = set(self._columns.values())
        kept = {key: value for key, value in row.items() if key not in theirs and key not in self._columns}
        return kept | {ours: row.get(column) for ours, column in self._columns.items()}

    def _convert(self, row: RawRecord, format: Format) -> list[Record]:
        try:
            drafts = format.convert(self._renamed(row.value))
        except BadRecord as fault:
            self.report.read += 1
            self.report.add(row.place, self._in_their_words(fault))
            return []
        return [record for draft in drafts for record in self._check(draft, row.place)]

    def _in_their_words(self, fault: BadRecord) -> BadRecord:
        """Name the file's column beside our key."""
        detail = fault.detail
        for ours, column in self._columns.items():
            detail = detail.replace(f"`{ours}`", f"`{ours}` (column `{column}`)")
        return BadRecord(fault.reason, detail)

    def _check(self, draft: Draft | BadRecord, place: str) -> Iterator[Record]:
        self.report.read += 1
        fault = draft if isinstance(draft, BadRecord) else _fault_of(draft)
        if fault is None:
            assert isinstance(draft, Draft)
            yield to_record(draft, place)
        else:
            self.report.add(place, fault)


def _fault_of(draft: Draft) -> BadRecord | None:
    """What is wrong with a converted record, whatever its format was."""
    prompt = draft.prompt
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        return BadRecord("empty prompt", f"the prompt is {prompt!r}")
    names = ("chosen response", "rejected response") if len(draft.responses) == 2 else ("response",)
    for name, text in zip(names, draft.responses, strict=True):
        if not text.strip():
            return BadRecord("empty response", f"the {name} to {excerpt(prompt)} is {text!r}")
    if len(draft.responses) == 2 and draft.responses[0] == draft.responses[1]:
        return BadRecord("chosen equal to rejected", excerpt(draft.responses[0]))
    return None
