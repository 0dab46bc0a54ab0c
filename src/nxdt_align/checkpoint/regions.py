"""Parts of stored tensors: what a rank of a sharded model reads."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from nxdt_align.checkpoint.extents import Extent, WeightsError, byte_view, read_bytes, read_tensor


def read_region(extent: Extent, region: Sequence[slice]) -> Tensor:
    """The part of a tensor that ``region``, a start and a stop for each dimension, cuts out, in new memory.

    Of a row-major tensor of at most two dimensions no other byte is read. Raises WeightsError for a file
    that is cut short.
    """
    cut = [slice(*part.indices(size)[:2]) for part, size in zip(region, extent.shape, strict=True)]
    if extent.stride is not None or len(cut) > 2:
        return read_tensor(extent)[tuple(cut)].clone()
    part = torch.empty([max(0, each.stop - each.start) for each in cut], dtype=extent.dtype)
    first = extent.offset + (cut[0].start * extent.row_bytes if cut else 0)
    if part.numel() == 0:
        return part
    if len(cut) < 2 or part.shape[1] == extent.shape[1]:
        read_bytes(extent.path, first, part)
    else:
        _read_rows(extent, first + cut[1].start * extent.dtype.itemsize, part)
    return part


def _read_rows(extent: Extent, first: int, part: Tensor) -> None:
    """Rows that are shorter than the stored ones; the first of them is at ``first``."""
    view, size = byte_view(part), part.shape[1] * part.dtype.itemsize
    try:
        descriptor = os.open(extent.path, os.O_RDONLY)
    except OSError as error:
        raise WeightsError(f"{extent.path} cannot be read: {error.strerror}") from error
    try:
        for row in range(len(part)):
            target = view[row * size : (row + 1) * size]
            if os.preadv(descriptor, [target], first + row * extent.row_bytes) < size:
                raise WeightsError(
                    f"{extent.path} is damaged: it ends before the bytes of a tensor; copy it again"
                )
    finally:
        os.close(descriptor)
