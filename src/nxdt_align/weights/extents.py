"""Tensors as byte ranges of a file, read and written with positioned I/O instead of mmap.

Every touched page of a mapped file counts as used memory; positioned reads do not, so that a model larger
than the machine's memory can be converted.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nxdt_align.errors import UserError

BLOCK = max(4096, mmap.PAGESIZE)
"""Alignment of weights in written files, in bytes, so that they can be mapped, or written with O_DIRECT."""
_LARGE = 1 << 20
"""Bytes; torch allocates smaller tensors."""

Bytes = NDArray[np.uint8]
_thread = threading.local()


class WeightsError(UserError):
    """Weights that cannot be read or written; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes are. ``stride`` is in entries; None stands for row-major order."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of dimension 0."""
        return prod(self.shape[1:]) * self.dtype.itemsize


# Transfers: the default, which direct_io.py can replace per thread


class Transfers:
    """Through the page cache, into new memory for each tensor."""

    def memory(self, size: int) -> mmap.mmap | memoryview:
        """``size`` bytes, uninitialised, from the start of a page, for one large tensor."""
        return new_memory(size)

    def read(self, path: Path, offset: int, target: Bytes) -> int:
        """Fill ``target`` from ``offset`` on; returns the bytes read: fewer where the file ends. Raises
        OSError."""
        return _read_rows(path, offset, 0, target[None])

    def write(self, path: Path, offset: int, source: Bytes) -> None:
        """Put ``source`` into an existing file. Raises OSError."""
        done = 0
        with opened(path, os.O_WRONLY) as descriptor:
            while done < len(source):
                done += os.pwrite(descriptor, source[done:].data, offset + done)


_CACHED = Transfers()


@contextmanager
def transfers_by(transfers: Transfers) -> Iterator[None]:
    """Inside, this thread's reads and writes go by ``transfers``."""
    _thread.transfers = transfers
    try:
        yield
    finally:
        _thread.transfers = _CACHED


def _transfers() -> Transfers:
    found: Transfers = getattr(_thread, "transfers", _CACHED)
    return found


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor. Raises OSError."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def new_memory(size: int) -> mmap.mmap:
    """Anonymous memory in huge pages, if available: faulting in small pages takes half of the time of reading
    a weight."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor for bytes that are read, uninitialised, row-major."""
    size = prod(shape) * dtype.itemsize
    if size < _LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(_transfers().memory(size), dtype=dtype).view(tuple(shape))


# Tensors


def read_tensor(extent: Extent) -> Tensor:
    """The whole tensor, in new memory, row-major. Raises WeightsError for a file that is cut short."""
    if extent.stride is None:
        tensor = empty(extent.shape, extent.dtype)
        read_into(extent, tensor)
        return tensor
    span = 1 + sum((size - 1) * step for size, step in zip(extent.shape, extent.stride, strict=True))
    flat = empty((span if prod(extent.shape) else 0,), extent.dtype)
    _fill(extent.path, flat, lambda memory: _transfers().read(extent.path, extent.offset, memory))
    return flat.as_strided(extent.shape, extent.stride).contiguous()


def read_into(extent: Extent, target: Tensor, first_row: int = 0) -> None:
    """Fill ``target`` (contiguous, the dtype of ``extent``) with rows from ``first_row`` on."""
    if extent.stride is not None:
        target.copy_(read_tensor(extent)[first_row : first_row + len(target)])
        return
    first = extent.offset + first_row * extent.row_bytes
    _fill(extent.path, target, lambda memory: _transfers().read(extent.path, first, memory))


def read_region(extent: Extent, region: Sequence[slice]) -> Tensor:
    """The part of a tensor that ``region``, a start and a stop per dimension, cuts out, in new memory: what
    a rank of a sharded model reads.

    Of a row-major tensor of at most two dimensions no other byte is read. Raises WeightsError for a file
    that is cut short.
    """
    cut = [slice(*part.indices(size)[:2]) for part, size in zip(region, extent.shape, strict=True)]
    if extent.stride is not None or len(cut) > 2:
        return read_tensor(extent)[tuple(cut)].clone()
    part = empty([max(0, each.stop - each.start) for each in cut], extent.dtype)
    first = extent.offset + (cut[0].start * extent.row_bytes if cut else 0)
    if part.numel() == 0:
        return part
    if len(cut) < 2 or part.shape[1] == extent.shape[1]:
        _fill(extent.path, part, lambda memory: _transfers().read(extent.path, first, memory))
    else:
        first += cut[1].start * extent.dtype.itemsize
        step, rows = extent.row_bytes, (len(part), -1)
        # A rank's columns are too short for transfers past the cache.
        _fill(extent.path, part, lambda memory: _read_rows(extent.path, first, step, memory.reshape(rows)))
    return part


def write_bytes(path: Path, offset: int, source: Tensor) -> None:
    """Put a contiguous tensor's bytes into an existing file. Raises OSError."""
    _transfers().write(path, offset, byte_array(source))


def _fill(path: Path, target: Tensor, read: Callable[[Bytes], int]) -> None:
    """Hand a contiguous tensor's memory to ``read``, which returns how much it filled. Raises WeightsError
    where that is not all."""
    wanted = byte_array(target)
    try:
        count = read(wanted)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if count < len(wanted):
        raise WeightsError(f"{path} is damaged: it ends before the bytes of a tensor; copy it again")


def _read_rows(path: Path, offset: int, step: int, target: Bytes) -> int:
    """Fill the rows of ``target`` from places ``step`` bytes apart; returns the bytes read."""
    total = 0
    with opened(path, os.O_RDONLY) as descriptor:
        for number, row in enumerate(target):
            done, count = 0, 1
            while count and done < len(row):
                count = os.preadv(descriptor, [row[done:].data], offset + number * step + done)
                done += count
            total += done
    return total


def byte_array(tensor: Tensor) -> Bytes:
    """The memory of a contiguous CPU tensor."""
    array: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array


def byte_view(tensor: Tensor) -> memoryview:
    """``byte_array`` for what takes any buffer."""
    return byte_array(tensor).data


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether contiguous CPU tensors of one dtype and size hold the same bits, also where they are NaN."""
    first, second = byte_array(one), byte_array(other)
    words = len(first) // 8 * 8  # eight at a time: ten times faster than one by one
    return (
        one.dtype == other.dtype
        and np.array_equal(first[:words].view(np.uint64), second[:words].view(np.uint64))
        and np.array_equal(first[words:], second[words:])
    )


def is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    step = 1
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and found != step:
            return False
        step *= size
    return True
