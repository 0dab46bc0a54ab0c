"""JSON files, plain or gzipped, record by record: lines, an array, or an object.

With the standard library, so that a bad record is reported with its file and line; `datasets` would stop at
the first without naming it. Sizes and depths are bounded: a damaged or malicious file is a message, whatever
it unpacks to.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nxdt_align.data.raw import MAX_RECORD, RawRecord, other_content
from nxdt_align.data.records import BadRecord, DataError, excerpt

_BOM = b"\xef\xbb\xbf"
"""Windows tools write UTF-8 with a byte-order mark, which json rejects."""
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_DEPTH = 100
"""Objects and arrays inside one another; what reads a record later goes through them recursively."""
_MAX_WHOLE = 4 * 2**30
"""Bytes of a file that is one array or object: it is read at once."""
_MAX_SKIPPED = 2**30
"""Bytes of one line that are passed over in the search for its end."""
_MAX_RATIO, _ALWAYS_UNPACKED = 200, 16 * 2**20
"""gzip packs text 3 to 20 times, and nothing more than 1,030 times; bytes that are unpacked in any case."""
_PART = 2**20
"""Bytes per read of a whole file."""


@dataclass(frozen=True)
class JsonLine:
    """A line of a file of JSON lines, to be parsed where there is a processor for it."""

    place: str
    content: bytes

    def parsed(self) -> RawRecord:
        return _parse_line(self.content, self.place)


def read_json(path: Path) -> Iterator[RawRecord | JsonLine]:
    """A .json file may hold lines, and a .jsonl file an array: the first character decides. Lines come
    unparsed.

    Raises DataError if the whole file is broken; a single bad record is yielded with its ``fault``.
    """
    try:
        with open(path, "rb") as file:
            yield from _read_data(_Data(path, file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip data ({error}); copy or compress the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


class _Data:
    """The unpacked bytes of a file, never more of them than a data file would have."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._packed = file
        self._is_packed = path.name.lower().endswith(".gz")
        self._file: IO[bytes] = gzip.GzipFile(fileobj=file) if self._is_packed else file  # type: ignore[assignment]

    def beginning(self) -> bytes:
        """The first bytes that are not white space; none if there are only such."""
        self._file.seek(0)
        while part := self._file.read(_PART):
            self._refuse_bombs()
            found = part.removeprefix(_BOM).lstrip()
            if found:
                return found[:64]
        return b""

    def lines(self) -> Iterator[bytes | None]:
        """All lines, stripped of white space; None for one that is too long. Raises DataError where no line
        end comes."""
        self._file.seek(0)
        unchecked = 0
        while line := self._file.readline(MAX_RECORD + 1):
            unchecked += len(line)
            if unchecked > _PART:
                self._refuse_bombs()
                unchecked = 0
            if len(line) > MAX_RECORD:
                self._skip_line()
                yield None
            else:
                yield line.removeprefix(_BOM).strip()

    def _skip_line(self) -> None:
        skipped = 0
        while part := self._file.readline(_PART):
            skipped += len(part)
            if part.endswith(b"\n"):
                return
            if skipped > _MAX_SKIPPED:
                raise DataError(
                    f"{self.path}: a line has more than {_MAX_SKIPPED:,} bytes: no file of JSON lines; "
                    "write a record per line"
                )
            self._refuse_bombs()

    def whole(self) -> str:
        """All of it as text; bytes that are not UTF-8 become lone surrogates, which text checks report."""
        self._file.seek(0)
        parts, size = [], 0
        while part := self._file.read(_PART):
            parts.append(part)
            size += len(part)
            self._refuse_bombs()
            if size > _MAX_WHOLE:
                raise DataError(
                    f"{self.path}: a JSON array or object is read at once, but this one is larger than "
                    f"{_MAX_WHOLE:,} bytes; write JSON lines, a record per line"
                )
        return b"".join(parts).decode("utf-8-sig", errors="surrogateescape")

    def _refuse_bombs(self) -> None:
        if not self._is_packed:
            return
        unpacked, packed = self._file.tell(), self._packed.tell()
        if unpacked > max(_ALWAYS_UNPACKED, _MAX_RATIO * packed):
            raise DataError(
                f"{self.path}: unpacks to more than {_MAX_RATIO} times its size, as no text does; if it is "
                "right, unpack it with gunzip and name what it holds"
            )


def _read_data(data: _Data) -> Iterator[RawRecord | JsonLine]:
    path, beginning = data.path, data.beginning()
    told = other_content(beginning)
    if told is not None:
        raise DataError(f"{path} holds {told}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if beginning.startswith(b"["):
        yield from _read_array(data.whole(), path)
    elif beginning.startswith(b"{") and ".json" in suffixes and not _are_lines(data):
        yield from _read_object(data)
    else:
        yield from _read_lines(data)


def _are_lines(data: _Data) -> bool:
    """Whether the first line is an object and more follows."""
    filled = (line for line in data.lines() if line != b"")
    try:
        first = next(filled, None)
        return first is not None and isinstance(json.loads(first), dict) and next(filled, b"") != b""
    except (ValueError, RecursionError):
        return False


def _read_object(data: _Data) -> Iterator[RawRecord | JsonLine]:
    """A file that is one object: records by prompt, as the DPO reference implementation keeps them
    (``{prompt: {"responses": ..., "pairs": ..., "sft_target": ...}}``), or a single record. Lines if it is
    none."""
    text = data.whole()
    try:
        whole = _parse(text)
    except BadRecord:
        whole = None
    if not isinstance(whole, dict):
        yield from _read_lines(data)
    elif whole and all(isinstance(value, dict) for value in whole.values()):
        for number, (prompt, value) in enumerate(whole.items(), start=1):
            yield RawRecord(f"{data.path}:record {number}", {"prompt": prompt, **value})
    else:
        yield RawRecord(f"{data.path}:1", whole)


def _read_lines(data: _Data) -> Iterator[RawRecord | JsonLine]:
    for number, line in enumerate(data.lines(), start=1):
        if line is None:
            fault = BadRecord("too long", f"the line has more than {MAX_RECORD:,} bytes")
            yield RawRecord(f"{data.path}:{number}", None, fault)
        elif line:
            yield JsonLine(f"{data.path}:{number}", line)


def _parse_line(content: bytes, place: str) -> RawRecord:
    try:
        return RawRecord(place, _parse(content.decode("utf-8")))
    except UnicodeDecodeError as error:
        around = content[max(error.start - 20, 0) : error.start + 20]
        fault = BadRecord("not UTF-8", f"byte {error.start + 1} of the line, {excerpt(around)}")
        return RawRecord(place, None, fault)
    except BadRecord as fault:
        return RawRecord(place, None, fault)


def _parse(text: str) -> Any:
    """Raises BadRecord."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad JSON", f"{_reason(error)}, in {excerpt(text[:200])}") from error
    if _is_deep(value, text, 0, len(text)):
        raise BadRecord("bad JSON", f"nested more than {_MAX_DEPTH} deep, in {excerpt(text[:200])}")
    return value


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    if isinstance(error, RecursionError):
        return f"nested more than {_MAX_DEPTH} deep"
    return "a number has more than 4,300 digits"


def _is_deep(value: Any, text: str, start: int, stop: int) -> bool:
    # Counting is a hundred times faster than looking, and enough for all but a few records.
    if text.count("[", start, stop) + text.count("{", start, stop) <= _MAX_DEPTH:
        return False
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _read_array(text: str, path: Path) -> Iterator[RawRecord]:
    """Element by element, so that each has its line. After a syntax error the rest cannot be parsed."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_space(text, _skip_space(text, 0) + 1)
    while text[position : position + 1] != "]":
        # Counts only the new part, so that line numbers cost one pass over the text.
        line, counted = line + text.count("\n", counted, position), position
        place, start = f"{path}:{line}", position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: bad JSON inside the array: {_reason(error)}") from error
        if position - start > MAX_RECORD:
            yield RawRecord(place, None, BadRecord("too long", f"it has more than {MAX_RECORD:,} bytes"))
        elif isinstance(value, dict | list) and _is_deep(value, text, start, position):
            yield RawRecord(place, None, BadRecord("bad JSON", f"nested more than {_MAX_DEPTH} deep"))
        else:
            yield RawRecord(place, value)
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise DataError(f"{path}:{line}: bad JSON: expected ',' or ']' in the array")
    rest = text[position + 1 : position + 200].strip()
    if rest:
        raise DataError(f"{path}: bad JSON: {excerpt(rest)} follows the array's end")


def _skip_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    assert match is not None
    return match.end()
