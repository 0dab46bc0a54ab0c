"""A conversion's transfers with O_DIRECT, bypassing the page cache, through reused memory.

A conversion touches every byte once. The page cache would cost an extra copy of each, into newly allocated
pages, at several times the cost of the transfer; and verification should read from the device. Ranks that
load the same weights benefit from the cache and keep using it. Transfers still use the cache if the file
system has no O_DIRECT, for small or unaligned pieces, and if the data are already cached.

This file is optional: delete it, and import ``contextlib.nullcontext`` instead in convert.py.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from nxdt_align.weights.extents import BLOCK, Bytes, Transfers, new_memory, opened, transfers_by

_LEAST = 1 << 18
"""Bytes; smaller transfers are not worth a second descriptor."""
_CHUNK = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)
_libc = ctypes.CDLL(None)
_thread = threading.local()


def direct_transfers(capacity: int) -> AbstractContextManager[None]:
    """A context in which this thread bypasses the page cache.

    Tensors read in each such block reuse the same memory, plus new memory beyond ``capacity`` bytes; do not
    use them after the block.
    """
    kept: _DirectTransfers | None = getattr(_thread, "kept", None)
    if kept is None or kept.capacity != capacity:
        kept = _thread.kept = _DirectTransfers(capacity)
    kept.used = 0
    return transfers_by(kept)


class _DirectTransfers(Transfers):
    """One thread's transfers. Its memory is page-aligned, as O_DIRECT requires."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self._arena = memoryview(new_memory(capacity))
        self._buffer: Bytes = np.frombuffer(new_memory(_CHUNK), dtype=np.uint8)
        """A bounce buffer for data that are not block-aligned in the file or page-aligned in memory."""

    def memory(self, size: int) -> mmap.mmap | memoryview:
        if self.used + size > self.capacity:
            return new_memory(size)
        start = self.used
        self.used += -(-size // BLOCK) * BLOCK
        return self._arena[start : start + size]

    def read(self, path: Path, offset: int, target: Bytes) -> int:
        done = 0
        with _opened_direct(path, os.O_RDONLY, len(target)) as direct:
            if direct is not None and not _is_cached(path, offset, len(target)):
                while done < len(target):
                    count = self._read(direct, offset + done, target[done : done + _CHUNK])
                    if not count:  # the file ends, or the system refuses
                        break
                    done += count
        return done + super().read(path, offset + done, target[done:])

    def write(self, path: Path, offset: int, source: Bytes) -> None:
        done = 0
        with _opened_direct(path, os.O_WRONLY, len(source)) as direct:
            if direct is not None:
                done = min(-offset % BLOCK, len(source))
                super().write(path, offset, source[:done])
                stop = done + (len(source) - done) // BLOCK * BLOCK
                while done < stop:
                    count = self._write(direct, offset + done, source[done : min(done + _CHUNK, stop)])
                    if not count:  # the system refuses
                        break
                    done += count
        super().write(path, offset + done, source[done:])

    def _read(self, descriptor: int, offset: int, target: Bytes) -> int:
        """Bytes read; 0 where the file ends or the system refuses."""
        skipped = offset % BLOCK
        is_aligned = not skipped and len(target) >= BLOCK and _starts_at_block(target)
        buffer = target if is_aligned else self._buffer
        blocks = len(target) // BLOCK if is_aligned else -(-(skipped + len(target)) // BLOCK)
        try:
            found = os.preadv(descriptor, [buffer[: min(blocks * BLOCK, _CHUNK)].data], offset - skipped)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return 0
        count = max(0, min(found - skipped, len(target)))
        if not is_aligned:
            target[:count] = buffer[skipped : skipped + count]
        return count

    def _write(self, descriptor: int, offset: int, source: Bytes) -> int:
        """Bytes written, whole blocks; 0 where the system refuses."""
        buffer = source
        if not _starts_at_block(source):
            buffer = self._buffer[: len(source)]
            buffer[:] = source
        try:
            return os.pwrite(descriptor, buffer.data, offset) // BLOCK * BLOCK
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return 0


@contextmanager
def _opened_direct(path: Path, flags: int, size: int) -> Iterator[int | None]:
    """A descriptor with O_DIRECT; None for small transfers, and if the file system has none."""
    if size < _LEAST or not _DIRECT:
        yield None
        return
    try:
        descriptor = os.open(path, flags | _DIRECT)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_cached(path: Path, offset: int, size: int) -> bool:
    """Whether the page cache holds all of these bytes (mincore(2)), so that reading from it is faster."""
    start = offset // BLOCK * BLOCK
    try:
        with (
            opened(path, os.O_RDONLY) as descriptor,
            mmap.mmap(descriptor, offset + size - start, prot=mmap.PROT_READ, offset=start) as mapped,
        ):
            resident = np.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
            view = np.frombuffer(mapped, dtype=np.uint8)
            failed = _libc.mincore(_address(view), ctypes.c_size_t(len(view)), _address(resident))
            del view  # a map with exported buffers cannot be closed
    except (OSError, ValueError):  # the file cannot be mapped, or is shorter
        return False
    return not failed and bool((resident & 1).all())


def _starts_at_block(array: Bytes) -> bool:
    return not array.ctypes.data % BLOCK


def _address(array: Bytes) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
