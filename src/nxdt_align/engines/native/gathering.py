"""Whole weights out of parts, one at a time, on rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nxdt_align.engines.native.collectives import Ranks


@torch.no_grad()
def whole_tensors(
    named_parameters: Iterable[tuple[str, Tensor]], ranks: Ranks
) -> Iterator[tuple[str, Tensor]]:
    """What all ranks hold together, by name, whole and on the CPU; yields on rank 0 alone.

    Every rank iterates to the end. None holds more than its part and one whole tensor.

    Args:
        ranks: with a group of its own, where pipeline stages hold different parameters.
    """
    parameters = {name: parameter.detach() for name, parameter in named_parameters}
    held = ranks.gather({name: (tuple(p.shape), p.dtype) for name, p in parameters.items()})
    for name in sorted(set().union(*held)):
        owner = next(rank for rank, names in enumerate(held) if name in names)
        mine = _whole(parameters[name]) if name in parameters else None
        if ranks.rank == 0:
            yield name, _received(owner, *held[owner][name], ranks) if mine is None else mine
        elif ranks.rank == owner:
            assert mine is not None
            dist.send(_bytes(mine), dst=0, group=ranks.group)


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _received(owner: int, shape: tuple[int, ...], dtype: torch.dtype, ranks: Ranks) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    dist.recv(_bytes(tensor), src=owner, group=ranks.group)
    return tensor


def _bytes(tensor: Tensor) -> Tensor:
    """gloo does not know every dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
