"""The part of a tensor that one rank holds: filled from a source, copied, gathered again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nxdt_align.engines import xla
from nxdt_align.engines.base import WeightSource
from nxdt_align.engines.checkpoint_folder import Shape, require_same_shapes
from nxdt_align.engines.ranks import Ranks


@dataclass(frozen=True)
class LocalShard:
    """A box of a whole tensor of ``shape``, which starts at ``offsets``. ``local`` holds its values."""

    local: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> LocalShard:
        """This rank's part; ``local`` is the tensor's own memory.

        Raises ValueError for a DTensor whose ranks hold summands or scattered rows instead of boxes.
        """
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return cls(tensor, tuple(tensor.shape), (0,) * tensor.ndim)
        with torch.no_grad():
            local = tensor.to_local()
        sizes, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        if any(placement.is_partial() for placement in tensor.placements) or tuple(sizes) != local.shape:
            raise ValueError(
                f"a tensor of shape {list(tensor.shape)} lies on the ranks as {tensor.placements}, of which "
                f"this one holds {list(local.shape)}: neither whole nor a box of it"
            )
        return cls(local, tuple(tensor.shape), tuple(offsets))

    @property
    def is_whole(self) -> bool:
        return tuple(self.local.shape) == self.shape

    @property
    def region(self) -> tuple[slice, ...]:
        """A start and a stop for each dimension of the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.local.shape, strict=True))

    def copied(self) -> LocalShard:
        """The same part with its values in memory of its own on the CPU."""
        return replace(self, local=self.local.to("cpu", copy=True))


@torch.no_grad()
def fill(named_parameters: Iterable[tuple[str, Tensor]], source: WeightSource) -> None:
    """Copy the source's values into the parameters, in the parameters' dtype. Every rank calls this.

    Args:
        named_parameters: what this rank holds, under the plain model's names: whole tensors, or DTensors
            on any mesh. Pipeline stages bring their own; together the ranks hold the model.

    A rank reads its part alone, and holds no more than that and one tensor of the source.

    Raises EngineError, the same on every rank, naming every tensor that is missing, surplus or of another
    shape; nothing is filled then. What the source raises on one rank is raised on all.
    """
    parameters = dict(named_parameters)
    ranks = Ranks()
    wanted: dict[str, Shape] = {}
    for shapes in ranks.gather({name: tuple(p.shape) for name, p in parameters.items()}):
        wanted |= shapes
    with ranks.together():
        require_same_shapes(source, wanted)
    with ranks.together():
        for name, parameter in parameters.items():
            with filling({name: parameter}) as parts:
                _read(parts[name], name, source)


@contextmanager
def filling(tensors: dict[str, Tensor]) -> Iterator[dict[str, LocalShard]]:
    """Their parts under their names, whose ``local`` is to be filled before the end.

    It is the tensors' own memory, but on a lazy device memory on the CPU, which is handed over at the end.
    """
    with xla.filling(tensors) as targets:
        yield {name: LocalShard.of(target) for name, target in targets.items()}


def _read(part: LocalShard, name: str, source: WeightSource) -> None:
    if part.is_whole:
        part.local.copy_(source.read(name))
    elif part.local.numel():
        part.local.copy_(source.read_slice(name, part.region))


@torch.no_grad()
def copy_weights(source: Iterable[tuple[str, Tensor]], target: Iterable[tuple[str, Tensor]]) -> None:
    """Values of one model for another of the same shape on the same ranks, which may be divided otherwise.
    Every rank calls this and holds no more than its parts and one whole tensor."""
    for (name, from_), (other, to) in zip(source, target, strict=True):
        assert name == other
        part = LocalShard.of(to)
        if part.region == LocalShard.of(from_).region:
            part.local.copy_(LocalShard.of(from_).local)
        else:
            whole = from_.full_tensor() if isinstance(from_, DTensor) else from_
            part.local.copy_(whole[part.region])


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
