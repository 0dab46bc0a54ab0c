"""The part of a tensor that one rank holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Part:
    """A box of a whole tensor of ``shape``, which starts at ``offsets``. ``local`` holds its values."""

    local: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        """This rank's part; ``local`` is the tensor's own memory.

        Raises ValueError for a DTensor whose ranks hold summands or scattered rows instead of boxes.
        """
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return cls(tensor, tuple(tensor.shape), (0,) * tensor.ndim)
        with torch.no_grad():
            local = tensor.to_local()
        sizes, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        if any(placement.is_partial() for placement in tensor.placements) or tuple(sizes) != local.shape:
            raise ValueError(
                f"a tensor of shape {list(tensor.shape)} lies on the ranks as {tensor.placements}, of which "
                f"this one holds {list(local.shape)}: neither whole nor a box of it"
            )
        return cls(local, tuple(tensor.shape), tuple(offsets))

    @property
    def is_whole(self) -> bool:
        return tuple(self.local.shape) == self.shape

    @property
    def region(self) -> tuple[slice, ...]:
        """A start and a stop for each dimension of the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.local.shape, strict=True))

    def copied(self) -> Part:
        """The same part with its values in memory of its own on the CPU."""
        return replace(self, local=self.local.to("cpu", copy=True))
