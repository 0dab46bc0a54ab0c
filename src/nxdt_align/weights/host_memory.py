"""Memory for weights on their way through a conversion."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

_LARGE = 1 << 20
"""Bytes: smaller tensors are left to torch."""
_PAGE = 4096
_thread = threading.local()


class _Arena:
    """Memory given out from the start again in each block of ``reused_memory``."""

    def __init__(self, capacity: int) -> None:
        self.memory = _map(capacity)
        self.capacity, self.used = capacity, 0

    def take(self, size: int) -> int | None:
        """Where in the memory ``size`` bytes are free; None where they do not fit."""
        if self.used + size > self.capacity:
            return None
        start = self.used
        self.used += -(-size // _PAGE) * _PAGE
        return start


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """New memory, uninitialised, row-major.

    A large tensor starts at a page, as transfers past the cache want it, and lies in huge pages where
    the system has them: half of the time of reading a weight would go into handing out small ones.
    """
    size = prod(shape) * dtype.itemsize
    if size < _LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    arena: _Arena | None = getattr(_thread, "arena", None)
    start = None if arena is None else arena.take(size)
    if arena is None or start is None:
        return torch.frombuffer(_map(size), dtype=dtype).view(tuple(shape))
    return torch.frombuffer(arena.memory, dtype=dtype, count=prod(shape), offset=start).view(tuple(shape))


@contextmanager
def reused_memory(capacity: int) -> Iterator[None]:
    """Inside, this thread's ``empty`` gives out the same memory in each block, and new memory past
    ``capacity`` bytes; no tensor may be used after the block."""
    arena: _Arena | None = getattr(_thread, "kept", None)
    if arena is None or arena.capacity != capacity:
        arena = _thread.kept = _Arena(capacity)
    arena.used = 0
    _thread.arena = arena
    try:
        yield
    finally:
        _thread.arena = None


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
