"""What brings a tensor from one form to another on the tensor-parallel ranks (the same on all, a part on
each, a term of a sum on each), with the gradient's way back. Parts are of the first dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .comm import all_gather, all_reduce, reduce_scatter
from .parallel_state import get_tensor_model_parallel_group


def summed(x: Tensor, group: ProcessGroup, *, pin_layout: bool = True) -> Tensor:
    """``x``, which becomes the sum of all ranks'."""
    return x if group.size() == 1 else all_reduce("sum", [x], groups=group, pin_layout=pin_layout)[0]


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    return x if group.size() == 1 else all_gather(x, dim=0, groups=group, pin_layout=False)


def scattered_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    return x if group.size() == 1 else reduce_scatter(x.contiguous(), dim=0, groups=group, pin_layout=False)


def own_part(x: Tensor, group: ProcessGroup) -> Tensor:
    size = x.shape[0] // group.size()
    return x.index_select(0, torch.arange(size, device=x.device) + group.rank() * size)


class _Copy(torch.autograd.Function):
    """The same on all ranks -> the same; gradients are terms, and summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    """Terms -> their sum; its gradient is that of each term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Parts -> the whole. Its gradients are terms, or (not ``to_model_parallel``) the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_model_parallel: bool, group: ProcessGroup) -> Tensor:
        ctx.settings = to_model_parallel, group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_model_parallel, group = ctx.settings
        part = scattered_sum if to_model_parallel else own_part
        return part(grad, group), None, None


class _ReduceScatter(torch.autograd.Function):
    """Terms -> this rank's part of their sum; its gradient is gathered in ``dtype``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dtype: torch.dtype) -> Tensor:
        ctx.settings = group, dtype
        return scattered_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, dtype = ctx.settings
        return gathered(grad.to(dtype), group), None, None


def copy_to_tensor_model_parallel_region(input_: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    group = process_group or get_tensor_model_parallel_group()
    copied: Tensor = _Copy.apply(input_, group)  # type: ignore[no-untyped-call]
    return copied


def reduce_from_tensor_model_parallel_region(
    input_: Tensor, process_group: ProcessGroup | None = None
) -> Tensor:
    group = process_group or get_tensor_model_parallel_group()
    reduced: Tensor = _Reduce.apply(input_, group)  # type: ignore[no-untyped-call]
    return reduced


def gather_from_sequence_parallel_region(input_: Tensor, to_model_parallel: bool = True) -> Tensor:
    group = get_tensor_model_parallel_group()
    whole: Tensor = _Gather.apply(input_, to_model_parallel, group)  # type: ignore[no-untyped-call]
    return whole


def reduce_scatter_to_sequence_parallel_region(input_: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    group = get_tensor_model_parallel_group()
    part: Tensor = _ReduceScatter.apply(  # type: ignore[no-untyped-call]
        input_, group, dtype or input_.dtype
    )
    return part
