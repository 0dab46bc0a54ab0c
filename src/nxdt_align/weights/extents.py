"""Tensors as bytes at a place in a file: read and written there, without mapping the file.

A mapped file counts as memory in use for every page that was touched; reading by position does not,
so that a model larger than the machine passes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nxdt_align.errors import UserError
from nxdt_align.weights.direct_io import Bytes, read_at, write_at
from nxdt_align.weights.host_memory import empty


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


def read_into(extent: Extent, target: Tensor, first_row: int = 0) -> None:
    """Fill ``target`` (contiguous, the dtype of ``extent``) with rows from ``first_row`` on."""
    if extent.stride is not None:
        target.copy_(read_tensor(extent)[first_row : first_row + len(target)])
        return
    read_bytes(extent.path, extent.offset + first_row * extent.row_bytes, target)


def read_bytes(path: Path, offset: int, target: Tensor) -> None:
    """Fill a contiguous tensor's memory. Raises WeightsError for a file that is cut short."""
    fill_bytes(path, target, lambda memory: read_at(path, offset, memory))


def fill_bytes(path: Path, target: Tensor, read: Callable[[Bytes], int]) -> None:
    """Hand a contiguous tensor's memory to ``read``, which returns how much it filled. Raises WeightsError
    where that is not all."""
    wanted = byte_array(target)
    try:
        count = read(wanted)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if count < len(wanted):
        raise WeightsError(f"{path} is damaged: it ends before the bytes of a tensor; copy it again")


def write_bytes(path: Path, offset: int, source: Tensor) -> None:
    """Put a contiguous tensor's bytes into an existing file. Raises OSError."""
    write_at(path, offset, byte_array(source))


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
