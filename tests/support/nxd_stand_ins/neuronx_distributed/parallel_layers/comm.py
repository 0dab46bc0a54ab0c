"""Collectives of a group's ranks, as instructions of the graph that is being recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch_xla.core.xla_model as xm
from torch import Tensor
from torch.distributed import ProcessGroup


def _mesh(group: ProcessGroup) -> list[list[int]]:
    """All groups of its kind, which an instruction names: it is the same on all ranks."""
    groups: list[list[int]] = group._mesh  # type: ignore[attr-defined]
    return groups


def all_reduce(
    op_type: str, tensor_bucket: Sequence[Tensor], groups: ProcessGroup, pin_layout: bool = True
) -> Sequence[Tensor]:
    """The tensors, reduced in place by one instruction."""
    reduced: Sequence[Tensor] = xm.all_reduce(
        op_type, list(tensor_bucket), groups=_mesh(groups), pin_layout=pin_layout
    )
    return reduced


def all_gather(input: Tensor, dim: int, groups: ProcessGroup, pin_layout: bool = True) -> Tensor:
    """All ranks' parts, one after the other along ``dim``."""
    whole: Tensor = xm.all_gather(input, dim=dim, groups=_mesh(groups), pin_layout=pin_layout)
    return whole


def reduce_scatter(input: Tensor, dim: int, groups: ProcessGroup, pin_layout: bool = True) -> Tensor:
    """This rank's part along ``dim`` of the sum of all ranks' tensors."""
    part: Tensor = xm.reduce_scatter(
        xm.REDUCE_SUM,
        input,
        scale=1.0,
        scatter_dim=dim,
        shard_count=groups.size(),
        groups=_mesh(groups),
        pin_layout=pin_layout,
    )
    return part
