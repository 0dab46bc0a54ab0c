"""The processes of a run as an engine's parts see them: groups that reduce tensors, and all of them
together, which agree over plain values on the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nxdt_align.engines.base import EngineError, together

T = TypeVar("T")
Reduction = Literal["sum", "max"]


class Group(ABC):
    """Ranks that reduce with each other, seen from one of them. Alone, it does nothing.

    Args:
        rank: this process's place in the group.
        size: processes in it.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.size > 1:
            self._sum(tensors)

    def summed(self, value: Tensor) -> Tensor:
        """The sum over the ranks; ``value`` stays as it is."""
        return value if self.size == 1 else self._reduced(value, "sum")

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum over the ranks; ``value`` stays as it is."""
        return value if self.size == 1 else self._reduced(value, "max")

    def gather(self, value: Tensor) -> Tensor:
        """(ranks, *value.shape): the ranks' values in their order, on every rank."""
        return value[None] if self.size == 1 else self._gather(value)

    # Called where there are several ranks.

    @abstractmethod
    def _sum(self, tensors: Sequence[Tensor]) -> None: ...

    @abstractmethod
    def _reduced(self, value: Tensor, how: Reduction) -> Tensor:
        """A new tensor."""

    @abstractmethod
    def _gather(self, value: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This process's groups."""

    tensor: Group
    """Ranks that share each layer's matrices, and the rows."""
    data: Group
    """Ranks that see other rows of the global batch."""
    pipeline: Group
    """Ranks that hold other layers, the first stage's first."""


_host_group: dist.ProcessGroup | None = None


def open_host_group(timeout: timedelta) -> None:
    """Have values on the host travel over a gloo group of their own from now on, as torch's default group is
    for a device alone. Collective; ``timeout``: how long a rank waits for the others."""
    global _host_group
    _host_group = dist.new_group(backend="gloo", timeout=timeout)


def host_group() -> dist.ProcessGroup | None:
    """What ``open_host_group`` has opened; None where torch's default group takes tensors on the CPU."""
    return _host_group


def close_host_group() -> None:
    """Before torch's groups are destroyed."""
    global _host_group
    _host_group = None


class Ranks:
    """All processes, as they agree over plain values (names, sizes, faults).

    Args:
        group: what they talk over; where None, the host's group if there is one, else torch's default.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        group = _host_group if group is None else group
        is_alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        self.size = 1 if is_alone else dist.get_world_size()
        self.rank = 0 if is_alone else dist.get_rank()
        self.group = group

    @classmethod
    def apart(cls, timeout: timedelta | None = None) -> Ranks:
        """In a process group of their own over the CPU, so that a thread can talk while training goes on,
        and whatever device the default group is for. Making it is a collective call.

        Args:
            timeout: how long a rank waits for the others; torch's default where None.
        """
        ranks = cls()
        if ranks.size > 1:
            ranks.group = dist.new_group(backend="gloo", timeout=timeout)
        return ranks

    @classmethod
    def of_one(cls, rank: int) -> Ranks:
        """This process as the only one that is there, whatever torch's group says."""
        ranks = cls.__new__(cls)
        ranks.size, ranks.rank, ranks.group = 1, rank, None
        return ranks

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

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank. The group must be one over the CPU, as that of
        ``apart``: no device is waited for."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.group)
        return int(box)

    def barrier(self) -> None:
        """Wait for all others, over the CPU as ``largest``: torch's own barrier looks for an accelerator."""
        self.largest(0)

    @contextmanager
    def together(self, error_type: type[EngineError] = EngineError) -> Iterator[None]:
        """See ``engines.base.together``."""
        with together(self.gather, error_type):
            yield
