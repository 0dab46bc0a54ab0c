"""Weights from a source into parameters, each rank its own part of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nxdt_align.engines import faults, xla
from nxdt_align.engines.base import WeightSource
from nxdt_align.engines.faults import Shape
from nxdt_align.engines.native.collectives import Ranks
from nxdt_align.engines.native.parts import Part


@torch.no_grad()
def fill(named_parameters: Iterable[tuple[str, Tensor]], source: WeightSource) -> None:
    """Copy the source's values into the parameters, in the parameters' dtype. Every rank calls this.

    Args:
        named_parameters: what this rank holds, under the plain Llama's names: whole tensors, or DTensors
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
        faults.require_same_shapes(source, wanted)
    with ranks.together():
        for name, parameter in parameters.items():
            with filling({name: parameter}) as parts:
                _read(parts[name], name, source)


@contextmanager
def filling(tensors: dict[str, Tensor]) -> Iterator[dict[str, Part]]:
    """Their parts under their names, whose ``local`` is to be filled before the end.

    It is the tensors' own memory, but on a lazy device memory on the CPU, which is handed over at the end.
    """
    with xla.filling(tensors) as targets:
        yield {name: Part.of(target) for name, target in targets.items()}


def _read(part: Part, name: str, source: WeightSource) -> None:
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
        part = Part.of(to)
        if part.region == Part.of(from_).region:
            part.local.copy_(Part.of(from_).local)
        else:
            whole = from_.full_tensor() if isinstance(from_, DTensor) else from_
            part.local.copy_(whole[part.region])
