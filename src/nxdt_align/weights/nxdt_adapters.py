"""Adapters in a checkpoint of engine nxd, whose shards hold them and no model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nxdt_align.models.partition import Partition, local_tensors
from nxdt_align.named_tensors import Spec, require_fit
from nxdt_align.weights.extents import WeightsError, read_tensor, same_bytes
from nxdt_align.weights.nxdt_files import MODEL, find_shards, open_shard, shard_name


class ShardedAdapter:
    """The adapters of such a checkpoint; whole tensors are assembled on demand.

    Args:
        partition: the model that they belong to as its ranks had it, with its adapters.

    Raises WeightsError naming every shard or tensor that is missing, surplus or misshapen.
    """

    def __init__(self, path: Path, partition: Partition) -> None:
        assert partition.adapters is not None
        self.path, self.spec, self._partition = path, partition.adapters, partition
        self._files = {place: open_shard(file) for place, file in find_shards(path / MODEL).items()}
        wanted: dict[str, Spec] = {}
        for stage in range(partition.pp):
            names = [name for name in local_tensors(partition, stage) if self.spec.trains(name)]
            for rank in range(partition.tp):
                shapes = {name: partition.local_shape(name) for name in names}
                wanted |= {f"{n} in {shard_name(rank, stage)}": (s, None) for n, s in shapes.items()}
        require_fit(
            self,
            {
                f"{name} in {shard_name(*place)}": (extent.shape, None)
                for place, tensors in self._files.items()
                for name, extent in tensors.items()
            },
            wanted,
            error=WeightsError,
            hint="It must be a checkpoint of adapters of this model's shape",
        )

    def __str__(self) -> str:
        return f"the adapters of checkpoint {self.path}"

    def read(self, name: str) -> Tensor:
        """The whole tensor. Raises WeightsError where ranks hold different copies."""
        [stage] = self._partition.stage_of(name)
        whole: Tensor | None = None
        seen: set[tuple[int, int]] = set()
        for rank in range(self._partition.tp):
            share = read_tensor(self._files[rank, stage][name])
            if whole is None:
                whole = torch.empty(self._partition.whole_shape(name), dtype=share.dtype)
            dim, ranges = self._partition.ranges(name, rank)
            first = 0
            for start, stop in ranges:
                piece, place = share.narrow(dim, first, stop - start), whole.narrow(dim, start, stop - start)
                if (start, stop) in seen and not same_bytes(piece.contiguous(), place.contiguous()):
                    raise WeightsError(
                        f"{self}: tensor-parallel rank {rank} holds another copy of {name} than an earlier "
                        "rank, though copies must be equal; take another checkpoint"
                    )
                place.copy_(piece)
                seen.add((start, stop))
                first += stop - start
        assert whole is not None
        return whole
