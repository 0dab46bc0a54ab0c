"""Queries, keys and values in one layer, for more tensor-parallel ranks than there are kv heads: each head's
weights are on ``kv_size_multiplier`` ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..parallel_layers.comm import all_reduce
from ..parallel_layers.layers import divided, flat, reduced
from ..parallel_layers.mappings import gathered
from ..parallel_layers.parallel_state import (
    get_kv_shared_group,
    get_tensor_model_parallel_group,
    initialize_kv_group,
)

QKV = tuple[Tensor, Tensor, Tensor]


class _QKV(torch.autograd.Function):
    """x W' of each of ``weights``: those of q, k and v, or one of all three's rows, of ``sizes``.

    Keys and values of shared heads have the sum of all copies' gradients. Their share of the gradient of x is
    divided by the number of copies, as every copy adds it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sizes: list[int],
        copies: int,
        scattered: bool,
        reduce_dtype: torch.dtype,
        *weights: Tensor,
    ) -> QKV:
        ctx.settings = copies, scattered, reduce_dtype
        ctx.save_for_backward(x, *weights)
        whole = _whole(x, scattered)
        products = [whole.matmul(weight.t()) for weight in weights]
        q, k, v = torch.split(products[0], sizes, dim=-1) if len(weights) == 1 else products
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        copies, scattered, reduce_dtype = ctx.settings
        q, k, v = grads
        whole = flat(_whole(x, scattered))
        if copies > 1:
            copied = [grad.to(reduce_dtype) for grad in (k, v)]
            k, v = (
                each.to(q.dtype)
                for each in all_reduce("sum", copied, groups=get_kv_shared_group(), pin_layout=False)
            )
        if len(weights) == 1:
            of_input = torch.cat([q, k / copies, v / copies], dim=-1).matmul(weights[0])
            outputs = [torch.cat([q, k, v], dim=-1)]
        else:
            first, *shared = (grad.matmul(weight) for grad, weight in zip((q, k, v), weights, strict=True))
            of_input = first + (shared[0] + shared[1]) / copies
            outputs = [q, k, v]
        of_input = reduced(of_input, get_tensor_model_parallel_group(), scattered, reduce_dtype)
        of_weights = [flat(grad).t().matmul(whole) for grad in outputs]
        return of_input, None, None, None, None, *of_weights


def _whole(x: Tensor, scattered: bool) -> Tensor:
    return gathered(x, get_tensor_model_parallel_group()) if scattered else x


def _project(
    *,
    input: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    weight_v: Tensor | None,
    weight_qkv: Tensor | None,
    sequence_parallel_enabled: bool,
    output_size_q: int,
    output_size_kv: int,
    kv_size_multiplier: int,
    reduce_dtype: torch.dtype,
) -> QKV:
    sizes = [output_size_q, output_size_kv, output_size_kv]
    weights = [each for each in (weight_q, weight_k, weight_v, weight_qkv) if each is not None]
    settings = (sizes, kv_size_multiplier, sequence_parallel_enabled, reduce_dtype)
    products: QKV = _QKV.apply(input, *settings, *weights)  # type: ignore[no-untyped-call]
    return products


class GQAQKVColumnParallelLinear(nn.Module):
    """A rank has some heads of each; tokens are the first dimension under sequence parallel. NxD's making of
    biases fails, so that the engine makes them itself."""

    weight_q: nn.Parameter | None
    weight_k: nn.Parameter | None
    weight_v: nn.Parameter | None
    weight_qkv: nn.Parameter | None
    bias_q: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    bias_qkv: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        *,
        bias: bool,
        gather_output: bool,
        dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        sequence_parallel_enabled: bool,
        kv_size_multiplier: int,
        fuse_qkv: bool,
    ) -> None:
        super().__init__()
        if bias or gather_output:
            raise NotImplementedError("the stand-ins make no biases, and leave outputs divided")
        initialize_kv_group(kv_size_multiplier)
        ranks, (queries, keys) = get_tensor_model_parallel_group().size(), output_sizes
        self.q_output_size_per_partition = divided(queries, ranks)
        self.kv_output_size_per_partition = divided(keys * kv_size_multiplier, ranks)
        self.kv_size_multiplier, self.fuse_qkv, self.reduce_dtype = kv_size_multiplier, fuse_qkv, reduce_dtype
        self.sequence_parallel_enabled = sequence_parallel_enabled
        q, kv = self.q_output_size_per_partition, self.kv_output_size_per_partition
        sizes = {"qkv": q + 2 * kv} if fuse_qkv else {"q": q, "k": kv, "v": kv}
        for part in ("q", "k", "v", "qkv"):
            weight = torch.empty(sizes[part], input_size, dtype=dtype) if part in sizes else None
            self.register_parameter(f"weight_{part}", None if weight is None else nn.Parameter(weight))
            self.register_parameter(f"bias_{part}", None)
        # The engine puts its own here where a layer has adapters.
        self._forward_impl = _project

    def forward(self, input: Tensor) -> QKV:
        q, k, v = self._forward_impl(
            input=input,
            weight_q=self.weight_q,
            weight_k=self.weight_k,
            weight_v=self.weight_v,
            weight_qkv=self.weight_qkv,
            sequence_parallel_enabled=self.sequence_parallel_enabled,
            output_size_q=self.q_output_size_per_partition,
            output_size_kv=self.kv_output_size_per_partition,
            kv_size_multiplier=self.kv_size_multiplier,
            reduce_dtype=self.reduce_dtype,
        )
        biases: tuple[Tensor | None, ...] = (self.bias_q, self.bias_k, self.bias_v)
        if self.bias_qkv is not None:
            biases = torch.split(self.bias_qkv, [q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = (x if bias is None else x + bias for x, bias in zip((q, k, v), biases, strict=True))
        return q, k, v
