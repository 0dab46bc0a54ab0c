"""Layers of whose weights each tensor-parallel rank has a part. They are made on the meta device, where
weights get no values.

Under sequence parallel the tokens between layers are divided as well, and the first dimension: a layer then
gathers them, or scatters its summed result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from .mappings import (
    gathered,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scattered_sum,
    summed,
)
from .parallel_state import get_tensor_model_parallel_group


def divided(size: int, parts: int) -> int:
    assert size % parts == 0, f"{size} is not divided by {parts}"
    return size // parts


def flat(x: Tensor) -> Tensor:
    """(A, B, F) -> (A * B, F)"""
    return x.view(-1, x.shape[-1])


def reduced(terms: Tensor, ranks: ProcessGroup, scattered: bool, dtype: torch.dtype) -> Tensor:
    """The sum of the ranks' gradients of an input, or this rank's part of it, reduced in ``dtype``."""
    wide = terms.to(dtype)
    total = scattered_sum(wide, ranks) if scattered else summed(wide, ranks, pin_layout=False)
    return total.to(terms.dtype)


class ParallelEmbedding(nn.Module):
    """A rank has the rows of the tokens from ``start_index`` up to ``end_index``."""

    start_index: int | Tensor
    end_index: int | Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype,
        sequence_parallel_enabled: bool,
    ) -> None:
        super().__init__()
        group = get_tensor_model_parallel_group()
        rows = divided(num_embeddings, group.size())
        self.start_index, self.end_index = rows * group.rank(), rows * (group.rank() + 1)
        self.is_divided = group.size() > 1
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim, dtype=dtype))

    def forward(self, input_: Tensor) -> Tensor:
        """(B, S) tokens -> (B, S, D), or (S / tp, B, D)."""
        if not self.is_divided:
            return F.embedding(input_.long(), self.weight)
        is_here = (input_ >= self.start_index) & (input_ < self.end_index)
        # Row 0 for tokens of other ranks, then nothing.
        rows = F.embedding(((input_ - self.start_index) * is_here.long()).long(), self.weight)
        term = rows * is_here.to(rows.dtype).unsqueeze(-1)
        if self.sequence_parallel_enabled:
            return reduce_scatter_to_sequence_parallel_region(term.transpose(0, 1).contiguous())
        return reduce_from_tensor_model_parallel_region(term)


class _Linear(torch.autograd.Function):
    """x W', of a rank's part of W.

    Where ``ranks`` multiply the same x with other outputs' weights, the gradient of x is the sum of theirs,
    reduced in ``reduce_dtype``. Where x is ``scattered`` each has some tokens of it, which are gathered, and
    again for the gradient of W, instead of being kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ranks: ProcessGroup | None,
        scattered: bool,
        reduce_dtype: torch.dtype,
    ) -> Tensor:
        ctx.settings = ranks, scattered, reduce_dtype
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return torch.einsum("...m,mn->...n", _whole(x, ranks, scattered), weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ranks, scattered, reduce_dtype = ctx.settings
        whole = None if x is None else flat(_whole(x, ranks, scattered))
        of_input = grad.matmul(weight)
        if ranks is not None:
            of_input = reduced(of_input, ranks, scattered, reduce_dtype)
        of_weight = None if whole is None else flat(grad).t().matmul(whole)
        return of_input, of_weight, None, None, None


def _whole(x: Tensor, ranks: ProcessGroup | None, scattered: bool) -> Tensor:
    return gathered(x, ranks) if ranks is not None and scattered else x


def _linear(
    *,
    input: Tensor,
    weight: Tensor,
    process_group: ProcessGroup | None,
    sequence_parallel_enabled: bool,
    reduce_dtype: torch.dtype,
) -> Tensor:
    product: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        input, weight, process_group, sequence_parallel_enabled, reduce_dtype
    )
    return product


class _ParallelLinear(nn.Module):
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: tuple[int, int],
        bias: int | None,
        dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        sequence_parallel_enabled: bool,
        sequence_dimension: int | None,
    ) -> None:
        super().__init__()
        if sequence_dimension not in (None, 0):
            raise NotImplementedError("the stand-ins divide the first dimension")
        self.reduce_dtype = reduce_dtype
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.weight = nn.Parameter(torch.empty(weight, dtype=dtype))
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias, dtype=dtype))
        # The engine puts its own here where a layer has adapters.
        self._forward_impl = _linear


class ColumnParallelLinear(_ParallelLinear):
    """A rank has some outputs."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        gather_output: bool,
        dtype: torch.dtype,
        stride: int = 1,
        reduce_dtype: torch.dtype = torch.float32,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
    ) -> None:
        if gather_output:
            raise NotImplementedError("the stand-ins leave outputs divided")
        # ``stride`` says which rows of a whole weight a rank has; there is none here.
        outputs = divided(output_size, get_tensor_model_parallel_group().size() * stride) * stride
        super().__init__(
            (outputs, input_size),
            outputs if bias else None,
            dtype,
            reduce_dtype,
            sequence_parallel_enabled,
            sequence_dimension,
        )

    def forward(self, input: Tensor) -> Tensor:
        outputs = self._forward_impl(
            input=input,
            weight=self.weight,
            process_group=get_tensor_model_parallel_group(),
            sequence_parallel_enabled=self.sequence_parallel_enabled,
            reduce_dtype=self.reduce_dtype,
        )
        return outputs if self.bias is None else outputs + self.bias


class RowParallelLinear(_ParallelLinear):
    """A rank has some inputs, and the bias whole, which is added once terms are summed."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        input_is_parallel: bool,
        dtype: torch.dtype,
        reduce_dtype: torch.dtype = torch.float32,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
    ) -> None:
        if not input_is_parallel:
            raise NotImplementedError("the stand-ins take divided inputs")
        inputs = divided(input_size, get_tensor_model_parallel_group().size())
        super().__init__(
            (output_size, inputs),
            output_size if bias else None,
            dtype,
            reduce_dtype,
            sequence_parallel_enabled,
            sequence_dimension,
        )
        self.input_is_parallel = input_is_parallel

    def forward(self, input_: Tensor) -> Tensor:
        term = self._forward_impl(
            input=input_,
            weight=self.weight,
            process_group=None,
            sequence_parallel_enabled=False,
            reduce_dtype=self.reduce_dtype,
        )
        dtype, term = term.dtype, term.to(self.reduce_dtype)
        if self.sequence_parallel_enabled:
            outputs = reduce_scatter_to_sequence_parallel_region(term, dtype)
        else:
            outputs = reduce_from_tensor_model_parallel_region(term)
        outputs = outputs.to(dtype)
        return outputs if self.bias is None else outputs + self.bias
