"""Reads files and data sets as raw records with their positions; formats.py interprets them."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nxdt_align.data.arrow_files import read_arrow, read_parquet, read_saved_folder
from nxdt_align.data.json_files import JsonLine, read_json
from nxdt_align.data.raw import EXTENSIONS, RawRecord
from nxdt_align.data.records import DataError

_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def read_raw(path: str) -> Iterator[RawRecord]:
    """The records of a file, of a folder written by `datasets`' ``save_to_disk``, or of a data set id.

    Raises DataError if there is nothing to read or the whole file is broken; a single bad record is yielded
    with its ``fault``.
    """
    return map(parsed, read_unparsed(path))


def parsed(row: RawRecord | JsonLine) -> RawRecord:
    return row.parsed() if isinstance(row, JsonLine) else row


def read_unparsed(path: str) -> Iterator[RawRecord | JsonLine]:
    """As ``read_raw``, but JSON lines come as they are."""
    try:
        place = Path(path).expanduser()
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if not is_dataset_id(path):
            raise DataError(_not_found(path)) from error
        yield from _read_hub(path)
        return
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:
        # A null byte or a lone surrogate in the name; ~ of a user who has no home.
        raise DataError(f"{path!r} cannot be the path of a file: {error}") from error
    if stat.S_ISDIR(mode):
        yield from read_saved_folder(place)
    elif stat.S_ISREG(mode):
        yield from _read_file(place)
    else:
        raise DataError(f"{path} is a pipe, socket or device; write the data to a file and name that")


def is_dataset_id(path: str) -> bool:
    """Whether a path that leads to nothing here may be one."""
    return _DATASET_ID.fullmatch(path) is not None and not path.lower().endswith(EXTENSIONS)


def _not_found(path: str) -> str:
    place = Path(path).expanduser()
    if place.is_symlink():
        return f"data file {path} is a link to {place.readlink()}, which does not exist"
    message = f"data file {path} does not exist"
    with suppress(OSError):
        near = sorted(p.name for p in place.parent.iterdir() if p.name.lower().endswith(EXTENSIONS))[:5]
        message += f"; its folder holds {', '.join(near)}" if near else "; its folder holds no data file"
    return message


def _read_file(path: Path) -> Iterator[RawRecord | JsonLine]:
    name = path.name.lower()
    if not name.endswith(EXTENSIONS):
        raise DataError(f"{path}: unknown file type; a data file ends in one of {', '.join(EXTENSIONS)}")
    try:
        with open(path, "rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if is_empty:
        raise DataError(f"{path} is empty; name a file with at least one record")
    if name.endswith(".arrow"):
        yield from read_arrow(path)
    elif name.endswith(".parquet"):
        yield from read_parquet(path)
    else:
        yield from read_json(path)


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
