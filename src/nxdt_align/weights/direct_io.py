"""Bytes between memory and files; in a block of ``past_cache``, past the system's cache (O_DIRECT).

A conversion touches every byte once. Through the cache each would be copied once more, into memory that
has to be found for it, at several times the cost of the transfer itself; and what is read back to be
verified should come from the device. Ranks that load the same weights want the cache. Where the file
system has no such mode, where bytes are few or do not fill a block, and where the cache holds what is to
be read, they go through the cache in any case.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK = max(4096, mmap.PAGESIZE)
"""Bytes: what is transferred past the cache starts and ends at a multiple of this in the file."""
_LEAST = 1 << 18
_CHUNK = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_libc = ctypes.CDLL(None)
_thread = threading.local()

Bytes = NDArray[np.uint8]


@contextmanager
def past_cache() -> Iterator[None]:
    """Inside, this thread reads and writes past the cache."""
    _thread.is_direct = True
    try:
        yield
    finally:
        _thread.is_direct = False


def read_at(path: Path, offset: int, target: Bytes) -> int:
    """Fill ``target`` from ``offset`` on. Raises OSError.

    Returns the bytes read: fewer where the file ends.
    """
    done = 0
    with _opened(path, os.O_RDONLY) as cached, _opened_direct(path, os.O_RDONLY, len(target)) as direct:
        is_direct = direct is not None and not _is_cached(cached, offset, len(target))
        while done < len(target):
            part, place = target[done : done + _CHUNK], offset + done
            count = _read_direct(direct, place, part) if is_direct and direct is not None else 0
            count = count or os.preadv(cached, [part.data], place)
            if not count:
                break
            done += count
    return done


def read_rows_at(path: Path, offset: int, step: int, rows: int, target: Bytes) -> int:
    """Fill ``target`` with equal shares from ``rows`` places ``step`` bytes apart; returns as ``read_at``."""
    done, share = 0, len(target) // rows if rows else 0
    with _opened(path, os.O_RDONLY) as cached:
        for row in range(rows):
            done += os.preadv(cached, [target[row * share : (row + 1) * share].data], offset + row * step)
    return done


def write_at(path: Path, offset: int, source: Bytes) -> None:
    """Put ``source`` into an existing file. Raises OSError."""
    with _opened(path, os.O_WRONLY) as cached, _opened_direct(path, os.O_WRONLY, len(source)) as direct:
        head = min(-offset % BLOCK, len(source)) if direct is not None else len(source)
        _write_cached(cached, offset, source[:head])
        done = head
        stop = done + (len(source) - done) // BLOCK * BLOCK
        while direct is not None and done < stop:
            count = _write_direct(direct, offset + done, source[done : min(done + _CHUNK, stop)])
            if not count:
                break
            done += count
        _write_cached(cached, offset + done, source[done:])


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _opened_direct(path: Path, flags: int, size: int) -> Iterator[int | None]:
    """A descriptor past the cache; None outside of ``past_cache``, for few bytes, and where there is none."""
    if size < _LEAST or not _DIRECT or not getattr(_thread, "is_direct", False):
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


def _is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether the cache holds all of these bytes, mincore(2): then it is the quicker place to read."""
    start = offset // BLOCK * BLOCK
    try:
        with mmap.mmap(descriptor, offset + size - start, prot=mmap.PROT_READ, offset=start) as mapped:
            resident = np.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
            view = np.frombuffer(mapped, dtype=np.uint8)
            failed = _libc.mincore(_address(view), ctypes.c_size_t(len(view)), _address(resident))
            del view  # a map that is looked at cannot be closed
    except (OSError, ValueError):  # no maps of such files; or it ends before
        return False
    return not failed and bool((resident & 1).all())


def _blocks(size: int) -> int:
    """Bytes of the blocks that ``size`` bytes take, at most a buffer."""
    return min(-(-size // BLOCK) * BLOCK, _CHUNK)


def _starts_at_block(array: Bytes) -> bool:
    return not array.ctypes.data % BLOCK


def _address(array: Bytes) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _read_direct(descriptor: int, offset: int, target: Bytes) -> int:
    """Bytes read; 0 where the file ends or the system refuses."""
    skipped = offset % BLOCK
    is_aligned = not skipped and len(target) >= BLOCK and _starts_at_block(target)
    buffer = target if is_aligned else _buffer()
    wanted = len(target) // BLOCK * BLOCK if is_aligned else _blocks(skipped + len(target))
    try:
        found = os.preadv(descriptor, [buffer[:wanted].data], offset - skipped)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return 0
    count = max(0, min(found - skipped, len(target)))
    if not is_aligned:
        target[:count] = buffer[skipped : skipped + count]
    return count


def _write_direct(descriptor: int, offset: int, source: Bytes) -> int:
    """Bytes written, whole blocks; 0 where the system refuses."""
    buffer = source
    if not _starts_at_block(source):
        buffer = _buffer()[: len(source)]
        buffer[:] = source
    try:
        return os.pwrite(descriptor, buffer.data, offset) // BLOCK * BLOCK
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return 0


def _write_cached(descriptor: int, offset: int, source: Bytes) -> None:
    done = 0
    while done < len(source):
        done += os.pwrite(descriptor, source[done : done + _CHUNK].data, offset + done)


def _buffer() -> Bytes:
    """This thread's memory for transfers; it starts at a page, as the device wants it."""
    if not hasattr(_thread, "buffer"):
        _thread.buffer = np.frombuffer(mmap.mmap(-1, _CHUNK, flags=_ANONYMOUS), dtype=np.uint8)
    buffer: Bytes = _thread.buffer
    return buffer
