"""Tensors as bytes at a place in a file: read and written there, without mapping the file.

A mapped file counts as memory in use for every page that was touched; reading by position does not,
so that a model larger than the machine passes through it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nxdt_align.errors import UserError

_LARGE = 4 << 20
"""Bytes: from here on memory is asked for in huge pages."""
_MOST_AT_ONCE = 1 << 30
"""Bytes: Linux moves no more than 2 GiB in one call."""


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


def read_tensor(extent: Extent) -> Tensor:
    """The whole tensor, in new memory, row-major. Raises WeightsError for a file that is cut short."""
    if extent.stride is None:
        tensor = empty(extent.shape, extent.dtype)
        read_into(extent, tensor)
        return tensor
    span = 1 + sum((size - 1) * step for size, step in zip(extent.shape, extent.stride, strict=True))
    flat = empty((span if prod(extent.shape) else 0,), extent.dtype)
    read_bytes(extent.path, extent.offset, flat)
    return flat.as_strided(extent.shape, extent.stride).contiguous()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """New memory, uninitialised. Large ones in huge pages where the system has them: half of the time
    of reading a weight would go into handing out small ones."""
    size = prod(shape) * dtype.itemsize
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def read_into(extent: Extent, target: Tensor, first_row: int = 0) -> None:
    """Fill ``target`` (contiguous, the dtype of ``extent``) with rows from ``first_row`` on."""
    if extent.stride is not None:
        target.copy_(read_tensor(extent)[first_row : first_row + len(target)])
        return
    read_bytes(extent.path, extent.offset + first_row * extent.row_bytes, target)


def read_bytes(path: Path, offset: int, target: Tensor) -> None:
    """Fill a contiguous tensor's memory. Raises WeightsError for a file that is cut short."""
    view = byte_view(target)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + _MOST_AT_ONCE]], offset + done)
            if count == 0:
                raise WeightsError(f"{path} is damaged: it ends before the bytes of a tensor; copy it again")
            done += count
    finally:
        os.close(descriptor)


def write_bytes(path: Path, offset: int, source: Tensor) -> None:
    """Put a contiguous tensor's bytes into an existing file. Raises OSError."""
    view = byte_view(source)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done : done + _MOST_AT_ONCE], offset + done)
    finally:
        os.close(descriptor)


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view


def is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    step = 1
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and found != step:
            return False
        step *= size
    return True
