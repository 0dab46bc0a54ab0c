"""The groups of ranks that the model is spread over, as NxD makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import neuronx_distributed as nxd
import torch.distributed as dist
import torch_xla.core.xla_model as xm
from neuronx_distributed.parallel_layers import comm, parallel_state
from torch import Tensor

from nxdt_align.batch import Topology
from nxdt_align.engines import ranks
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.nxd.compat import Platform
from nxdt_align.engines.nxd.settings import Parallel, check_kv_groups
from nxdt_align.engines.ranks import Groups, Ranks

BUCKET_BYTES = 512 << 20
"""What one all-reduce takes at once."""


class Group(ranks.Group):
    """Of NxD, through whose functions reductions become part of the graph on XLA."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            comm.all_reduce("sum", bucket, groups=self._group)

    def _reduced(self, value: Tensor, how: ranks.Reduction) -> Tensor:
        reduced: Tensor = comm.all_reduce(how, [value.clone()], groups=self._group)[0]
        return reduced

    def _gather(self, value: Tensor) -> Tensor:
        gathered: Tensor = comm.all_gather(value[None].contiguous(), dim=0, groups=self._group)
        return gathered


@dataclass(frozen=True)
class Mesh:
    """Where this process stands, in NxD's groups."""

    platform: Platform
    parallel: Parallel
    groups: Groups
    ranks: Ranks
    """All processes, over gloo, whatever the device."""
    topology: Topology
    nxd_config: dict[str, Any]
    """neuronx_distributed_config's."""


def make_mesh(parallel: Parallel, platform: Platform) -> Mesh:
    """Have NxD make its groups. Every process calls this.

    NxD keeps one set of groups per process: a second call must ask for the same sizes. Raises EngineError
    where it does not, and for sizes that NxD gets wrong.
    """
    config: dict[str, Any] = nxd.neuronx_distributed_config(
        tensor_parallel_size=parallel.tensor,
        pipeline_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence_parallel,
        optimizer_config={"zero_one_enabled": parallel.zero1, "grad_clipping": False},
    )
    if parallel_state.get_tensor_model_parallel_size() != parallel.tensor:
        raise EngineError(
            f"neuronx-distributed keeps one tensor-parallel size a process: it has "
            f"{parallel_state.get_tensor_model_parallel_size()}, and cannot have {parallel.tensor} as well"
        )
    if parallel.qkv in ("split", "fused"):
        parallel_state.initialize_kv_group(parallel.kv_multiplier)
        check_kv_groups(
            parallel_state.get_kv_shared_replica_groups(),
            parallel_state.get_tensor_model_parallel_replica_groups(),
            parallel.kv_multiplier,
        )
    if platform.backend != "cpu":
        # As NxD's ranks meet when they save: in a graph, which a dry run then has as well.
        xm.rendezvous("nxdt-align: groups are made")
    groups = Groups(
        tensor=Group(parallel_state.get_tensor_model_parallel_group()),
        data=Group(parallel_state.get_data_parallel_group()),
        pipeline=Group(parallel_state.get_pipeline_model_parallel_group()),
    )
    if platform.alone:
        everyone = Ranks.of_one(dist.get_rank())
    else:
        everyone = Ranks() if dist.get_backend() == "gloo" else Ranks.apart()
    return Mesh(platform, parallel, groups, everyone, _topology(groups), config)


def _topology(groups: Groups) -> Topology:
    """Asked of NxD: at a tensor-parallel size of 4 on trn1 it takes ranks that are not neighbours."""
    return Topology(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        data_parallel_size=groups.data.size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        tensor_parallel_size=groups.tensor.size,
        tensor_parallel_rank=groups.tensor.rank,
        pipeline_parallel_size=groups.pipeline.size,
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
    )


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype, together up to BUCKET_BYTES."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.nbytes > room or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets
