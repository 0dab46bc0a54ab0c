"""Files of torch.save: the checksums that torch writes and does not compare, and words for what is wrong."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import IO, Any


class Stretch(io.RawIOBase):
    """Some bytes of an open file as a file of their own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def check_archive(file: Any) -> None:
    """Compare the checksums in a file of torch.save, which torch itself does not when it reads.

    Raises ValueError naming the record that differs, or for what is no such file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"it is no archive of torch.save: {error}") from error
    if wrong is not None:
        raise ValueError(
            f"the checksum of its record {wrong} is wrong: bits have changed since it was written"
        )


def reason(error: BaseException) -> str:
    """Why a file could not be read. Leaves out torch.load's advice to read it with code being run."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds something other than plain values"
    return str(error).partition("\n")[0] or type(error).__name__
