"""The native engine's processes as a mesh: who shares a layer, sees other rows, or holds other layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from nxdt_align.batch import Topology
from nxdt_align.engines import ranks
from nxdt_align.engines.native.settings import Parallel

PIPELINE, DATA, TENSOR = "pp", "dp", "tp"
"""The mesh's dimensions, outermost first, as ``Topology.of_rank`` numbers the ranks."""
TIMED_DEVICES = ("cpu", "cuda")
"""Types of devices whose backends, gloo and nccl, torch can give a group's timeout after it is made."""
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Group(ranks.Group):
    """Of torch.distributed.

    Args:
        group: torch's handle; None for all processes.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(rank, size)
        self.group = group

    def broadcast(self, value: Tensor, source: int) -> None:
        """Give every rank the ``source``-th rank's ``value``, in place."""
        if self.size > 1:
            dist.broadcast(value, group=self.group, group_src=source)

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        # All requests are under way before one is waited for.
        for work in [dist.all_reduce(t, group=self.group, async_op=True) for t in tensors]:
            work.wait()

    def _reduced(self, value: Tensor, how: ranks.Reduction) -> Tensor:
        result = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, _REDUCTIONS[how], group=self.group)
        return result

    def _gather(self, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.stack(parts)


def alone() -> Group:
    """The group of one rank."""
    return Group(0, 1)


@dataclass(frozen=True, kw_only=True)
class Groups(ranks.Groups):
    """This process among the others. ``mesh`` is None where it is alone."""

    parallel: Parallel = field(default_factory=Parallel)
    mesh: DeviceMesh | None = None
    world: Group = field(default_factory=alone)
    """All ranks."""
    data: Group = field(default_factory=alone)
    tensor: Group = field(default_factory=alone)
    pipeline: Group = field(default_factory=alone)
    ends: Group = field(default_factory=alone)
    """The first and the last stage of a pipeline, which both hold an embedding that is the head too; on
    other stages and for other models the rank alone."""

    @classmethod
    def join(
        cls,
        parallel: Parallel,
        topology: Topology,
        device_type: str,
        *,
        tied_head: bool = False,
        timeout: timedelta | None = None,
    ) -> Groups:
        """The groups of this process; all processes call this together, after init_process_group.

        Args:
            tied_head: whether the model's head is its embedding.
            timeout: how long a rank waits for the others of a group; torch's default where None, and where
                ``device_type`` is not one of TIMED_DEVICES.
        """
        sizes = (topology.pipeline_parallel_size, topology.data_parallel_size, topology.tensor_parallel_size)
        assert (parallel.pipeline, parallel.tensor) == (sizes[0], sizes[2]), (parallel, topology)
        if topology.world_size == 1:
            return cls(parallel=parallel)
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=(PIPELINE, DATA, TENSOR))
        groups = cls(
            parallel=parallel,
            mesh=mesh,
            world=Group(topology.rank, topology.world_size),
            data=_group(mesh, DATA),
            tensor=_group(mesh, TENSOR),
            pipeline=_group(mesh, PIPELINE),
            ends=_ends(mesh) if tied_head else alone(),
        )
        for group in (groups.data, groups.tensor, groups.pipeline, groups.ends):
            if group.group is not None and timeout is not None and device_type in TIMED_DEVICES:
                # torch gives each group 30 minutes, or 10 on nccl, whatever init_process_group was told.
                _set_pg_timeout(timeout, group.group)
        return groups

    @property
    def tensor_mesh(self) -> DeviceMesh | None:
        """The ranks that share a layer's matrices; None where this is one rank."""
        return self._submesh(TENSOR, self.tensor)

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """The ranks that see other rows; None where this is one rank."""
        return self._submesh(DATA, self.data)

    @property
    def shards_data(self) -> bool:
        """Whether weights, gradients and optimizer state are divided over the data-parallel ranks."""
        return (self.parallel.zero1 or self.parallel.fsdp) and self.data.size > 1

    def _submesh(self, name: str, group: Group) -> DeviceMesh | None:
        return None if self.mesh is None or group.size == 1 else self.mesh[name]


def _group(mesh: DeviceMesh, name: str) -> Group:
    return Group(mesh.get_local_rank(name), mesh[name].size(), mesh.get_group(name))


def _ends(mesh: DeviceMesh) -> Group:
    """The ranks at the two ends of this rank's pipeline, where it is one of them."""
    stage, stages = mesh.get_local_rank(PIPELINE), mesh[PIPELINE].size()
    own = alone()
    if stages == 1:
        return own
    pairs = mesh.mesh[[0, -1]].flatten(1).T.tolist()
    for pair in pairs:
        group = dist.new_group(pair)
        if dist.get_rank() in pair:
            own = Group(int(stage > 0), 2, group)
    return own
