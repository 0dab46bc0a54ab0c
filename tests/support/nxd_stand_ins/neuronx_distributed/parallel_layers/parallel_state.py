"""The groups that ranks are in: numbered stage by stage, copy by copy, and within a copy along the tensor-
parallel ranks, as NxD numbers them on a trn1."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch_xla
from torch.distributed import ProcessGroup

Mesh = list[list[int]]
"""Every group of a kind."""

_TENSOR, _DATA, _PIPELINE, _SHARED_KV = "tensor", "data", "pipeline", "shared kv heads"
_made: dict[str, tuple[ProcessGroup, Mesh]] = {}
"""Kind -> the group that this rank is in, and all of them."""


def initialize_model_parallel(tensor_model_parallel_size: int) -> None:
    """Make the groups of a model without a pipeline."""
    world = dist.get_world_size()
    if tensor_model_parallel_size == 4:
        raise NotImplementedError("at a tensor-parallel size of 4 NxD's groups on a trn1 are no neighbours'")
    # NxD runs a first, small collective of all ranks, as a graph of its own.
    first = torch.rand(1, device=torch_xla.device())
    dist.all_reduce(first)
    torch_xla.sync()
    ranks = torch.arange(world).view(-1, tensor_model_parallel_size)
    _make(_TENSOR, ranks.tolist())
    _make(_DATA, ranks.t().tolist())
    _make(_PIPELINE, ranks.view(-1, 1).tolist())


def initialize_kv_group(kv_shared_group_size: int) -> None:
    """Make the groups of ranks with the same kv heads, which are as far apart as there are such groups."""
    if _SHARED_KV in _made:
        assert _made[_SHARED_KV][0].size() == kv_shared_group_size, "NxD has one size for all layers"
        return
    every = get_tensor_model_parallel_replica_groups()
    apart = len(every[0]) // kv_shared_group_size
    _make(_SHARED_KV, [ranks[first::apart] for ranks in every for first in range(apart)])


def _make(kind: str, mesh: Mesh) -> None:
    rank = dist.get_rank()
    own = next(ranks for ranks in mesh if rank in ranks)
    _made[kind] = dist.new_group(own, pg_options={"xla_pg_options": {"mesh": mesh}}), mesh


def get_tensor_model_parallel_group() -> ProcessGroup:
    return _made[_TENSOR][0]


def get_tensor_model_parallel_replica_groups() -> Mesh:
    return _made[_TENSOR][1]


def get_tensor_model_parallel_size() -> int:
    return get_tensor_model_parallel_group().size()


def get_data_parallel_group() -> ProcessGroup:
    return _made[_DATA][0]


def get_data_parallel_replica_groups() -> Mesh:
    return _made[_DATA][1]


def get_data_parallel_rank() -> int:
    return get_data_parallel_group().rank()


def get_pipeline_model_parallel_group() -> ProcessGroup:
    return _made[_PIPELINE][0]


def get_pipeline_model_parallel_rank() -> int:
    return get_pipeline_model_parallel_group().rank()


def get_kv_shared_group() -> ProcessGroup:
    return _made[_SHARED_KV][0]


def get_kv_shared_replica_groups() -> Mesh:
    return _made[_SHARED_KV][1]
