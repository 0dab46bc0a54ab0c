"""Reads files and data sets as raw records with their positions; formats.py interprets them.

JSON is read line by line (an array element by element) with the standard library, so that a bad record is
reported with its file and line; `datasets` would stop at the first without naming it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_align.data.records import BadRecord, DataError, excerpt

EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".arrow", ".parquet")
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_ARROW_FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True)
class RawRecord:
    """A record as its file has it."""

    place: str
    """``file:line``, or ``file:record N`` where the file has no lines."""
    value: Any
    fault: BadRecord | None = None


def read_raw(path: str) -> Iterator[RawRecord]:
    """The records of a file, of a folder written by `datasets`' ``save_to_disk``, or of a data set id.

    Raises DataError if there is nothing to read or the whole file is broken; a single bad record is yielded
    with its ``fault``.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        yield from _read_saved_folder(place)
    elif place.exists():
        yield from _read_file(place)
    elif _is_dataset_id(path):
        yield from _read_hub(path)
    else:
        raise DataError(_not_found(path))


def _is_dataset_id(path: str) -> bool:
    return _DATASET_ID.fullmatch(path) is not None and not path.lower().endswith(EXTENSIONS)


def _not_found(path: str) -> str:
    message = f"data file {path} does not exist"
    parent = Path(path).expanduser().parent
    if parent.is_dir():
        near = sorted(p.name for p in parent.iterdir() if p.name.lower().endswith(EXTENSIONS))[:5]
        message += f"; its folder holds {', '.join(near)}" if near else "; its folder holds no data file"
    return message


def _read_file(path: Path) -> Iterator[RawRecord]:
    name = path.name.lower()
    if not name.endswith(EXTENSIONS):
        raise DataError(f"{path}: unknown file type; a data file ends in one of {', '.join(EXTENSIONS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; name a file with at least one record")
    if name.endswith(".arrow"):
        yield from _read_arrow(path)
    elif name.endswith(".parquet"):
        yield from _read_parquet(path)
    else:
        yield from _read_json(path)


# JSON


def _read_json(path: Path) -> Iterator[RawRecord]:
    """A .json file may hold lines, and a .jsonl file an array: the first character decides."""
    compressed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if compressed else open(path, "rb") as file:
            head = _first_character(file)
            file.seek(0)
            whole = _one_object(file.read()) if head == b"{" and ".json" in path.suffixes else None
            file.seek(0)
            if whole is not None:
                yield from _read_json_object(whole, path)
            elif head == b"[":
                yield from _read_json_array(file.read(), path)
            else:
                yield from _read_json_lines(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip data ({error}); copy or compress the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _first_character(file: Any) -> bytes:
    for line in file:
        # Windows tools write UTF-8 with a byte-order mark, which json rejects.
        text: bytes = line.removeprefix(b"\xef\xbb\xbf").strip()
        if text:
            return text[:1]
    return b""


def _one_object(data: bytes) -> dict[str, Any] | None:
    """``data`` as one JSON object; None if it is something else, such as JSON lines."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_json_object(whole: dict[str, Any], path: Path) -> Iterator[RawRecord]:
    """A file that is one object: records by prompt, as the DPO reference implementation keeps them
    (``{prompt: {"responses": ..., "pairs": ..., "sft_target": ...}}``), or a single record."""
    if whole and all(isinstance(value, dict) for value in whole.values()):
        for number, (prompt, value) in enumerate(whole.items(), start=1):
            yield RawRecord(f"{path}:record {number}", {"prompt": prompt, **value})
    else:
        yield RawRecord(f"{path}:1", whole)


def _read_json_lines(file: Any, path: Path) -> Iterator[RawRecord]:
    for number, line in enumerate(file, start=1):
        content: bytes = line.removeprefix(b"\xef\xbb\xbf").strip()
        if content:
            yield _parse_line(content, f"{path}:{number}")


def _parse_line(content: bytes, place: str) -> RawRecord:
    try:
        return RawRecord(place, json.loads(content.decode("utf-8")))
    except UnicodeDecodeError as error:
        around = content[max(error.start - 20, 0) : error.start + 20]
        fault = BadRecord("not UTF-8", f"byte {error.start + 1} of the line, {excerpt(around)}")
        return RawRecord(place, None, fault)
    except (json.JSONDecodeError, RecursionError) as error:
        return RawRecord(place, None, BadRecord("bad JSON", f"{error}, in {excerpt(content.decode())}"))


def _read_json_array(data: bytes, path: Path) -> Iterator[RawRecord]:
    """Element by element, so that each has its line. After a syntax error the rest cannot be parsed.

    Bytes that are not UTF-8 become lone surrogates, which the text checks of formats.py report.
    """
    text = data.decode("utf-8-sig", errors="surrogateescape")
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_space(text, _skip_space(text, 0) + 1)
    while text[position : position + 1] != "]":
        # Counts only the new part, so that line numbers cost one pass over the text.
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}:{line}: bad JSON inside the array: {error}") from error
        yield RawRecord(f"{path}:{line}", value)
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise DataError(f"{path}:{line}: bad JSON: expected ',' or ']' in the array")
    rest = text[position + 1 :].strip()
    if rest:
        raise DataError(f"{path}: bad JSON: {excerpt(rest)} follows the array's end")


def _skip_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    assert match is not None
    return match.end()


# Arrow, Parquet, data sets


def _read_arrow(path: Path) -> Iterator[RawRecord]:
    """An Arrow IPC file or stream (what `datasets` writes); the first bytes decide."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            yield from _rows(batches, path)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is not a whole Arrow file or stream: {error}") from error


def _read_parquet(path: Path) -> Iterator[RawRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _rows(file.iter_batches(batch_size=1024), path)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from error


def _rows(batches: Any, path: Path) -> Iterator[RawRecord]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 1024):
            for value in batch.slice(start, 1024).to_pylist():
                number += 1
                yield RawRecord(f"{path}:record {number}", value)


def _read_saved_folder(folder: Path) -> Iterator[RawRecord]:
    """A folder written by `datasets`' ``save_to_disk``: its state.json lists its Arrow files in order."""
    state = folder / "state.json"
    if not state.is_file():
        holds = sorted(p.name for p in folder.iterdir() if p.name.lower().endswith(EXTENSIONS))[:5]
        listing = f": it holds {', '.join(holds)}" if holds else ""
        raise DataError(f"{folder} is a folder; name one data file, or list several as a mixture{listing}")
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} does not list data files as datasets' save_to_disk does") from error
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder} is incomplete: {name}, which its state.json lists, is missing")
        yield from _read_arrow(folder / name)


def _read_hub(identifier: str) -> Iterator[RawRecord]:
    """``org/name`` or ``org/name:split`` (split ``train`` unless named) through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = identifier.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{identifier} is neither a file here nor a data set that can be reached: {reason}. "
            "Check the path; without a network, download the data first and name its file"
        ) from error
    for number, value in enumerate(rows, start=1):
        yield RawRecord(f"{identifier}:record {number}", value)
