"""Gradients as the optimizer wants them, and L2 norms over all ranks, each number counted once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nxdt_align.engines.native.mesh import Groups
from nxdt_align.models.partition import EMBEDDING

Named = Sequence[tuple[str, nn.Parameter]]


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def finish_gradients(named_parameters: Named, groups: Groups) -> None:
    """Sum what a step has added up over the ranks that hold parts of it; zeros where there is nothing.

    A weight that all tensor-parallel ranks hold gets from each a part of its gradient (``Partial``), where
    each sees some of the tokens or uses some of its rows. Data-parallel sums are FSDP's, where it is on.
    A tied embedding gets one part as the first stage's embedding, the other as the last stage's head.
    """
    parameters = [parameter for _, parameter in named_parameters]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    partial = [p for p in parameters if _is_partial(p.grad)]
    groups.tensor.sum([local(p.grad) for p in partial if p.grad is not None])
    for parameter in partial:
        assert isinstance(parameter, DTensor) and parameter.grad is not None
        parameter.grad = DTensor.from_local(
            local(parameter.grad), parameter.device_mesh, parameter.placements, run_check=False
        )
    if not groups.shards_data:
        groups.data.sum([local(p.grad) for p in parameters if p.grad is not None])
    groups.ends.sum([local(p.grad) for n, p in named_parameters if n == EMBEDDING and p.grad is not None])


def _is_partial(gradient: Tensor | None) -> bool:
    return isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements)


@torch.no_grad()
def total_norm(named: Sequence[tuple[str, Tensor]], groups: Groups) -> Tensor:
    """The L2 norm of all ranks' tensors, () float32, the same on every rank. One reduction.

    Args:
        named: parameters, or their gradients, under the parameters' names.
    """
    square = torch.stack([n.square() for n in torch._foreach_norm([local(t).float() for _, t in named])])
    share = torch.tensor([1 / _copies(name, tensor, groups) for name, tensor in named], device=square.device)
    return groups.world.summed((square * share).sum()).sqrt()


def _copies(name: str, tensor: Tensor, groups: Groups) -> int:
    """How many ranks hold the same numbers."""
    ranks = groups.data.size * groups.tensor.size * (groups.ends.size if name == EMBEDDING else 1)
    if not isinstance(tensor, DTensor):
        return ranks
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return ranks // prod(size for placement, size in sizes if not placement.is_replicate())


@torch.no_grad()
def clip_gradients(named_parameters: Named, max_norm: float | None, groups: Groups) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``; returns what it was.

    As torch.nn.utils.clip_grad_norm_ computes it.
    """
    gradients = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
    norm = total_norm(gradients, groups)
    if max_norm is not None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([local(gradient) for _, gradient in gradients], scale)
    return norm
