"""Collectives of the native engine; each does nothing in a single process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from nxdt_align.engines.base import EngineError

T = TypeVar("T")


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

    def summed(self, value: Tensor) -> Tensor:
        """The sum over the ranks; ``value`` stays as it is."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum over the ranks; ``value`` stays as it is."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return value
        result = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, how, group=self.group)
        return result

    def gather(self, value: Tensor) -> Tensor:
        """(ranks, *value.shape): the ranks' values, on every rank."""
        if self.size == 1:
            return value[None]
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.stack(parts)

    def broadcast(self, value: Tensor, source: int) -> None:
        """Give every rank the ``source``-th rank's ``value``, in place."""
        if self.size > 1:
            dist.broadcast(value, group=self.group, group_src=source)


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


def set_timeout(group: dist.ProcessGroup | None, timeout: timedelta | None) -> None:
    """How long a rank of ``group`` waits for the others. torch gives each group 30 minutes, or 10 on nccl,
    whatever init_process_group was told. None for either changes nothing."""
    if group is not None and timeout is not None:
        _set_pg_timeout(timeout, group)


class Ranks:
    """All processes, as they agree over plain values (names, sizes, faults).

    Args:
        own_group: talk in a process group of one's own, over the CPU, so that a thread can do so while
            training goes on. Making it is a collective call.
        timeout: how long a rank waits for the others in that group; torch's default where None.
    """

    def __init__(self, *, own_group: bool = False, timeout: timedelta | None = None) -> None:
        self.size = dist.get_world_size() if active() else 1
        self.rank = dist.get_rank() if active() else 0
        self.group = dist.new_group(backend="gloo") if own_group and active() else None
        set_timeout(self.group, timeout)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    @contextmanager
    def together(self, error_type: type[EngineError] = EngineError) -> Iterator[None]:
        """Every rank's block succeeds, or every rank raises: its own error, or else an ``error_type`` with
        the words of the first rank that failed. The block itself must not talk to other ranks."""
        try:
            yield
        except Exception as error:
            self.gather(str(error) or type(error).__name__)
            raise
        faults: list[str | None] = self.gather(None)
        fault = next((fault for fault in faults if fault is not None), None)
        if fault is not None:
            raise error_type(fault)
