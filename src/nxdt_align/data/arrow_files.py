"""Arrow and Parquet files, and the folders that `datasets`' ``save_to_disk`` writes, record by record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nxdt_align.data.raw import EXTENSIONS, MAX_RECORD, RawRecord
from nxdt_align.data.records import BadRecord, DataError

_ARROW_FILE_MAGIC = b"ARROW1"
_STREAM_IN_FILE = 8
"""Where the stream begins that an IPC file holds."""
_FRAMES = (b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""How a frame of Zstandard and one of LZ4 begin."""
_ROWS = 1024
"""Rows that are turned into Python objects at once."""
_MAX_ROWS, _ROWS_PER_BYTE = 10_000_000, 100
"""A column of nulls or of one repeated value takes no bytes per row, however many a damaged file claims."""
_MAX_RATIO, _ALWAYS_UNPACKED = 1000, 2**26
"""Of what a file says to unpack to; bytes that are unpacked whatever the ratio."""
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_MAX_STATE = 16 * 2**20
"""Bytes."""
# What pyarrow raises for damaged files: its own errors, most of which are also among these, and what Python
# raises for values that it cannot hold (dates, text that is not UTF-8) and for types nested too deep.
_DAMAGE = (
    *(ValueError, OSError, LookupError, TypeError, ArithmeticError, MemoryError, RecursionError),
    *(NotImplementedError, SystemError),
)


def read_arrow(path: Path) -> Iterator[RawRecord]:
    """An Arrow IPC file or stream (what `datasets` writes); the first bytes decide. Raises DataError."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
            source.seek(_STREAM_IN_FILE if is_file else 0)
            _refuse_bombs(path, _unpacked_bytes(source))
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            yield from _rows(batches, path)
    except DataError:
        raise
    except (pa.ArrowException, *_DAMAGE) as error:
        raise DataError(f"{path} is not a whole Arrow file or stream: {_reason(error)}") from error


def read_parquet(path: Path) -> Iterator[RawRecord]:
    """Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            _refuse_bombs(path, sum(group.total_byte_size for group in groups))
            yield from _rows(file.iter_batches(batch_size=_ROWS), path)
    except DataError:
        raise
    except (pa.ArrowException, *_DAMAGE) as error:
        raise DataError(f"{path} is not a whole Parquet file: {_reason(error)}") from error


def _unpacked_bytes(stream: Any) -> int:
    """Bytes that the compressed buffers of an Arrow stream say to have.

    Each is an int64, its size once unpacked (-1: it is not packed), before a frame of Zstandard or LZ4; the
    first of a message stands at its body's start, the others at multiples of 8 bytes.
    """
    import pyarrow as pa

    total = 0
    for body in _bodies(pa.ipc.MessageReader.open_stream(stream)):
        if body is None or len(body) < 16:
            continue
        view = memoryview(body)
        if bytes(view[:8]) != b"\xff" * 8 and bytes(view[8:12]) not in _FRAMES:
            continue
        for frame in re.finditer(b"|".join(map(re.escape, _FRAMES)), view):
            if frame.start() % 8 == 0:
                total += max(
                    0, int.from_bytes(view[frame.start() - 8 : frame.start()], "little", signed=True)
                )
    return total


def _bodies(messages: Any) -> Iterator[Any]:
    """The bodies of messages up to the first that cannot be read; the reader of rows judges that one."""
    import pyarrow as pa

    try:
        for message in messages:
            yield message.body
    except (pa.ArrowException, *_DAMAGE):
        return


def _refuse_bombs(path: Path, unpacked: int) -> None:
    if unpacked > max(_ALWAYS_UNPACKED, _MAX_RATIO * path.stat().st_size):
        raise DataError(
            f"{path}: unpacks to {unpacked:,} bytes, {_MAX_RATIO:,} times its size or more, as no text does; "
            "if it is right, write it again without compression"
        )


def _reason(error: BaseException) -> str:
    """On one line, whatever bytes of the file it quotes."""
    text = " ".join(f"{error or type(error).__name__}".split())[:300]
    return text.encode("utf-8", "backslashreplace").decode() + "; copy or write it again"


def _rows(batches: Any, path: Path) -> Iterator[RawRecord]:
    most = max(_MAX_ROWS, _ROWS_PER_BYTE * path.stat().st_size)
    number = 0
    for batch in batches:
        if number + batch.num_rows > most:
            raise DataError(f"{path} claims more than {most:,} rows, too many for its size; write it again")
        # Offsets are not checked on reading: damaged ones would be read from memory that is not the file's.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _ROWS):
            for value in _values(batch.slice(start, _ROWS)):
                number += 1
                fault = value if isinstance(value, BadRecord) else None
                yield RawRecord(f"{path}:record {number}", None if fault else value, fault)


def _values(rows: Any) -> list[Any]:
    """The rows as Python objects, a BadRecord for one that is too long."""
    # A dictionary is counted whole for each row that refers to it.
    import pyarrow as pa

    size = sum(column.nbytes for column in rows.columns if not pa.types.is_dictionary(column.type))
    if size <= MAX_RECORD:
        values: list[Any] = rows.to_pylist()
        return values
    if rows.num_rows == 1:
        return [BadRecord("too long", f"it has more than {MAX_RECORD:,} bytes")]
    half = rows.num_rows // 2
    return _values(rows.slice(0, half)) + _values(rows.slice(half))


def read_saved_folder(folder: Path) -> Iterator[RawRecord]:
    """A folder written by `datasets`' ``save_to_disk``: its state.json lists its Arrow files in order. Raises
    DataError."""
    for path in _saved_files(folder):
        yield from read_arrow(path)


def _saved_files(folder: Path) -> list[Path]:
    state = folder / _STATE
    try:
        if not state.is_file():
            raise DataError(_no_state(folder))
        with open(state, "rb") as file:
            entries = json.loads(file.read(_MAX_STATE))["_data_files"]
        paths = [folder / _name_inside(entry["filename"]) for entry in entries]
        missing = next((path for path in paths if not path.is_file()), None)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"{state} does not list data files as datasets' save_to_disk does; save the data set again"
        ) from error
    if missing is not None:
        raise DataError(f"{folder} is incomplete: {missing.name}, which its {_STATE} lists, is missing")
    return paths


def _name_inside(name: str) -> str:
    """``name``, which may not lead out of its folder. Raises ValueError, and TypeError if it is no text."""
    if name != Path(name).name or not name.isprintable():
        raise ValueError(f"{name!r} is not the name of a file")
    return name


def _no_state(folder: Path) -> str:
    names = sorted(place.name for place in folder.iterdir())
    if _SPLITS in names:
        splits = [name for name in names if (folder / name / _STATE).is_file()]
        return (
            f"{folder} holds several splits; name the folder of one: {', '.join(splits) or 'none is whole'}"
        )
    if _INFO in names:
        return (
            f"{folder} was written by datasets' save_to_disk, but its {_STATE} is missing: copy or save the "
            "data set again"
        )
    files = [name for name in names if name.lower().endswith(EXTENSIONS)][:5]
    listing = f": it holds {', '.join(files)}" if files else ""
    return f"{folder} is a folder; name one data file, or list several as a mixture{listing}"
