"""The native engine's processes as a mesh: who shares a layer, sees other rows, or holds other layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nxdt_align.batch import Topology
from nxdt_align.engines.native.collectives import Group, set_timeout
from nxdt_align.engines.native.settings import Parallel

PIPELINE, DATA, TENSOR = "pp", "dp", "tp"
"""The mesh's dimensions, outermost first, as ``Topology.of_rank`` numbers the ranks."""


@dataclass(frozen=True)
class Groups:
    """This process among the others. ``mesh`` is None where it is alone."""

    parallel: Parallel = field(default_factory=Parallel)
    mesh: DeviceMesh | None = None
    world: Group = field(default_factory=lambda: Group(0, 1))
    data: Group = field(default_factory=lambda: Group(0, 1))
    tensor: Group = field(default_factory=lambda: Group(0, 1))
    pipeline: Group = field(default_factory=lambda: Group(0, 1))
    ends: Group = field(default_factory=lambda: Group(0, 1))
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
            timeout: how long a rank waits for the others of a group; torch's default where None.
        """
        sizes = (topology.pipeline_parallel_size, topology.data_parallel_size, topology.tensor_parallel_size)
        assert (parallel.pipeline, parallel.tensor) == (sizes[0], sizes[2]), (parallel, topology)
        if topology.world_size == 1:
            return cls(parallel)
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=(PIPELINE, DATA, TENSOR))
        groups = cls(
            parallel,
            mesh,
            world=Group(topology.rank, topology.world_size),
            data=_group(mesh, DATA),
            tensor=_group(mesh, TENSOR),
            pipeline=_group(mesh, PIPELINE),
            ends=_ends(mesh) if tied_head else Group(0, 1),
        )
        for group in (groups.data, groups.tensor, groups.pipeline, groups.ends):
            set_timeout(group.group, timeout)
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
    own = Group(0, 1)
    if stages == 1:
        return own
    pairs = mesh.mesh[[0, -1]].flatten(1).T.tolist()
    for pair in pairs:
        group = dist.new_group(pair)
        if dist.get_rank() in pair:
            own = Group(int(stage > 0), 2, group)
    return own
