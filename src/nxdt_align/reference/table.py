"""The values of a data set in its order, in a file that every process of a machine maps: of it a step reads
the few values that it needs.

The file is NumPy's ``.npy``, named by a digest of the records' ids in their order, with a digest of the
values behind them: a file of that name is either this table or damaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

from nxdt_align.files import atomic_file
from nxdt_align.record_ids import Array, IdIndex, distinct, spans
from nxdt_align.reference.parts import FloatArray, Part, digest_of

FOLDER = "tables"
_DIGEST = 32
"""Characters at the file's end."""


class AbsentError(ValueError):
    """Some records have no value: their positions, ascending."""

    def __init__(self, positions: Array) -> None:
        super().__init__(f"{len(positions)} records have no value")
        self.positions = positions


def find_table(folder: Path, ids: Array, width: int) -> FloatArray | None:
    """The intact table of these records, (N, 16) uint8, in ``folder``, mapped: (N, width) float32; None
    without one."""
    path = _path(folder, ids, width)
    try:
        table = _mapped(path)
        with open(path, "rb") as file:
            file.seek(-_DIGEST, os.SEEK_END)
            expected = file.read().decode("ascii")
    except (OSError, ValueError, EOFError):
        return None
    is_sound = table.shape == (len(ids), width) and table.dtype == np.float32
    return table if is_sound and digest_of(table) == expected else None


def write_table(folder: Path, ids: Array, width: int, parts: Iterable[Part]) -> FloatArray:
    """Make the table of these records, (N, 16) uint8, from parts; the first that has a record counts.

    Returns it mapped, (N, width) float32. Raises AbsentError where parts lack records, and OSError; nothing
    is kept then.
    """
    first, places = distinct(ids)
    index = IdIndex(ids if places is None else ids[first])
    is_there = np.zeros(len(first), np.bool_)
    path = _path(folder, ids, width)
    with atomic_file(path) as file:
        shape, dtype = (len(ids), width), np.dtype(np.float32)
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        begin, size = file.tell(), dtype.itemsize * len(ids) * width
        # Now: a mapped page that finds no space on the disk later would end the process.
        os.posix_fallocate(file.fileno(), 0, begin + size + _DIGEST)
        file.flush()
        table = np.memmap(file, dtype, "r+", begin, shape)
        for part in parts:
            place, at = _new(index.find(part.ids), is_there)
            table[first[place]] = part.values[at]
            is_there[place] = True
        if not is_there.all():
            raise AbsentError(np.flatnonzero(~(is_there if places is None else is_there[places])))
        if places is not None:
            for span in spans(len(ids)):
                table[span] = table[first[places[span]]]
        table.flush()
        file.seek(begin + size)
        file.write(digest_of(table).encode("ascii"))
        del table
    return _mapped(path)


def _new(places: Array, is_there: Array) -> tuple[Array, Array]:
    """Of the places of a part's records, -1 for others': those without a value yet, each once, and where in
    the part it stands first."""
    wanted = np.flatnonzero(places >= 0)
    wanted = wanted[~is_there[places[wanted]]]
    found, at = np.unique(places[wanted], return_index=True)
    return found, wanted[at]


def _path(folder: Path, ids: Array, width: int) -> Path:
    digest = blake2b(f"{width} values each of ".encode(), digest_size=16)
    for span in spans(len(ids)):
        digest.update(np.ascontiguousarray(ids[span]).data)
    return folder / FOLDER / f"{digest.hexdigest()}.npy"


def _mapped(path: Path) -> FloatArray:
    table: FloatArray = np.load(path, mmap_mode="r", allow_pickle=False)
    return table
