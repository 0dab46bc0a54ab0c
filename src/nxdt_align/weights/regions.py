"""Parts of stored tensors: what a rank of a sharded model reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nxdt_align.weights.direct_io import read_rows_at
from nxdt_align.weights.extents import Extent, fill_bytes, read_bytes, read_tensor
from nxdt_align.weights.host_memory import empty


def read_region(extent: Extent, region: Sequence[slice]) -> Tensor:
    """The part of a tensor that ``region``, a start and a stop for each dimension, cuts out, in new memory.

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
        read_bytes(extent.path, first, part)
    else:
        first += cut[1].start * extent.dtype.itemsize
        rows, step = len(part), extent.row_bytes
        fill_bytes(extent.path, part, lambda memory: read_rows_at(extent.path, first, step, rows, memory))
    return part
