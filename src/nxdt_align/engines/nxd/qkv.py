"""NxD's layers for attention's input projections, in the places of the plain model's QKVProjection.

Legend: ``B`` rows, ``S`` tokens, ``P`` this rank's tokens (S, or S / tp under sequence parallel), ``D``
hidden. Under sequence parallel what comes in is (P, B, D), NxD's layout; what goes out is
(B, S, heads * head_dim) always, as the plain attention wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear
from neuronx_distributed.parallel_layers import ColumnParallelLinear, mappings, parallel_state
from torch import Tensor, nn
from torch.nn import functional as F

from nxdt_align.models.presets import DecoderConfig

QKVs = tuple[Tensor, Tensor, Tensor]
Term = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(product, input, weight) -> the product with what an adapter adds."""


class SwapFirstTwo(torch.autograd.Function):
    """(A, B, ...) -> (B, A, ...), contiguous in both passes: NxD's layers take views of what they get."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.transpose(0, 1).contiguous()


def swap_first_two(x: Tensor) -> Tensor:
    swapped: Tensor = SwapFirstTwo.apply(x)  # type: ignore[no-untyped-call]
    return swapped


def batch_first(parts: QKVs, sequence_parallel: bool) -> QKVs:
    if not sequence_parallel:
        return parts
    q, k, v = (swap_first_two(part) for part in parts)
    return q, k, v


class SharedKVProjection(GQAQKVColumnParallelLinear):  # type: ignore[misc]
    """Key and value heads repeated ``kv_multiplier`` times over the ranks; weight_q, weight_k and
    weight_v, or weight_qkv where ``fused``."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype,
        sequence_parallel: bool,
        kv_multiplier: int,
        fused: bool,
        cpu_mode: bool,
    ) -> None:
        head = config.head_dim
        super().__init__(
            config.hidden_size,
            [config.num_attention_heads * head, config.num_key_value_heads * head],
            bias=False,
            gather_output=False,
            dtype=dtype,
            # Its default, float32, is for bf16 that is reduced in float32; then NxD reduces a copy.
            reduce_dtype=dtype,
            sequence_parallel_enabled=sequence_parallel,
            kv_size_multiplier=kv_multiplier,
            fuse_qkv=fused,
        )
        if config.qkv_bias:
            # NxD's forward pass adds biases that are there, but its own making of them fails.
            self._make_biases(dtype, fused)
        if cpu_mode:
            # NxD's own reduces through XLA here, which is wrong without XLA devices.
            self._forward_impl = project

    def add_terms(self, terms: Sequence[Term | None]) -> None:
        """Of adapters of q, k and v. The layer's own weights must be frozen."""
        self._forward_impl = partial(project, terms=terms)

    def _make_biases(self, dtype: torch.dtype, fused: bool) -> None:
        queries, keys = self.q_output_size_per_partition, self.kv_output_size_per_partition
        sizes = {"q": queries, "k": keys, "v": keys}
        for part, size in ({"qkv": sum(sizes.values())} if fused else sizes).items():
            setattr(self, f"bias_{part}", nn.Parameter(torch.empty(size, dtype=dtype)))

    def forward(self, x: Tensor) -> QKVs:
        return batch_first(super().forward(x), self.sequence_parallel_enabled)


def whole_input(x: Tensor, *, sequence_parallel: bool) -> Tensor:
    """What every rank multiplies its outputs' weights with; its gradient is the sum of all ranks'."""
    whole: Tensor
    if sequence_parallel:
        whole = mappings.gather_from_sequence_parallel_region(x)
    else:
        whole = mappings.copy_to_tensor_model_parallel_region(x)
    return whole


def project(
    *,
    input: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    weight_v: Tensor | None,
    weight_qkv: Tensor | None,
    sequence_parallel_enabled: bool,
    output_size_q: int,
    output_size_kv: int,
    terms: Sequence[Term | None] = (None, None, None),
    **_: object,
) -> QKVs:
    """What the layer computes, with NxD's reductions, which go through gloo in CPU mode; and ``terms``.

    The weights of shared heads take part as copies: their gradients are summed over the ranks that
    hold the same heads. Each rank then adds its own share to the input's gradient.
    """
    whole = whole_input(input, sequence_parallel=sequence_parallel_enabled)
    if weight_qkv is not None:
        sizes = [output_size_q, output_size_kv, output_size_kv]
        weight_q, weight_k, weight_v = torch.split(weight_qkv, sizes)
    assert weight_q is not None and weight_k is not None and weight_v is not None
    group = parallel_state.get_kv_shared_group()
    shared = (mappings.copy_to_tensor_model_parallel_region(w, group) for w in (weight_k, weight_v))
    weights = (weight_q, *shared)
    q, k, v = (
        F.linear(whole, weight) if term is None else term(F.linear(whole, weight), whole, weight)
        for weight, term in zip(weights, terms, strict=True)
    )
    return q, k, v


class SeparateProjection(nn.Module):
    """Three layers, each of which gathers its input: for fewer ranks than kv heads, or as many."""

    def __init__(self, config: DecoderConfig, **settings: Any) -> None:
        super().__init__()
        head = config.head_dim
        settings = {"bias": config.qkv_bias, **settings}
        self.sequence_parallel = bool(settings["sequence_parallel_enabled"])
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        self.q_proj = ColumnParallelLinear(config.hidden_size, queries, **settings)
        self.k_proj = ColumnParallelLinear(config.hidden_size, keys, **settings)
        self.v_proj = ColumnParallelLinear(config.hidden_size, keys, **settings)

    def forward(self, x: Tensor) -> QKVs:
        return batch_first((self.q_proj(x), self.k_proj(x), self.v_proj(x)), self.sequence_parallel)


class CoalescedProjection(ColumnParallelLinear):  # type: ignore[misc]
    """One matrix for as many kv heads as query heads: each rank's rows are its q, k and v in turn."""

    def __init__(self, config: DecoderConfig, **settings: Any) -> None:
        width = config.num_attention_heads * config.head_dim
        super().__init__(config.hidden_size, 3 * width, stride=3, bias=config.qkv_bias, **settings)

    def forward(self, x: Tensor) -> QKVs:
        q, k, v = super().forward(x).chunk(3, dim=-1)
        return batch_first((q, k, v), self.sequence_parallel_enabled)
