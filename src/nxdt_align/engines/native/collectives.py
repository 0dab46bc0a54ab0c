"""Collectives of the native engine; each does nothing in a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Group:
    """The processes of a group, seen from one of them: a DataRanks.

    Args:
        rank: this process's place in the group.
        size: processes in it.
        group: torch's handle; None for all processes.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self.group = group

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place. All requests are under way before one is waited for."""
        if self.size > 1:
            for work in [dist.all_reduce(t, group=self.group, async_op=True) for t in tensors]:
                work.wait()

    def gather(self, value: Tensor) -> Tensor:
        """(ranks, *value.shape): the ranks' values, on every rank."""
        if self.size == 1:
            return value[None]
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.stack(parts)


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if active():
        dist.barrier()
