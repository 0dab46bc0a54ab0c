"""What the compiler's flash kernels compute, tile by tile, in torch; and what they ask of their arguments.

Read off the kernels' published source (aws-neuron/nki-samples, reference/attention.py, November 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
QUERIES = 128
"""Per tile."""


@dataclass(frozen=True)
class FlashConfig:
    seq_tile_size: int = 2048
    attn_core_tile_size: int = 256
    training: bool = True
    should_transpose_v: bool = False
    lse_dtype: str = ""


@dataclass
class StandIn:
    """Both kernels. ``rounds``: to bf16 where the tensor engine takes its operands, as with mixed_precision;
    without, what is left is float32's own rounding."""

    rounds: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    """What each call was told."""

    @property
    def flash_fwd(self) -> _Launched:
        return _Launched(self._forward)

    @property
    def flash_attn_bwd(self) -> _Launched:
        return _Launched(self._backward)

    def _taken(self, x: Tensor) -> Tensor:
        return x.bfloat16().float() if self.rounds else x

    def _forward(
        self,
        grid: tuple[int, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seed: None,
        logit_bias: Tensor,
        softmax_scale: float,
        use_causal_mask: bool,
        mixed_precision: bool,
        dropout_p: float,
        config: FlashConfig,
    ) -> tuple[Tensor, Tensor]:
        rows, heads, width, size = q.shape
        wide = (rows, heads, width, size)
        assert grid == (rows, heads) and seed is None and dropout_p == 0 and mixed_precision
        assert k.shape == wide and width <= 128
        assert v.shape == (wide if config.should_transpose_v else (rows, heads, size, width))
        assert q.dtype == k.dtype == v.dtype == logit_bias.dtype
        assert logit_bias.shape == (1, 1, size, size)
        large = config.seq_tile_size
        assert large >= 512 and size % large == 0 and config.training
        self.calls.append({"forward": True, "causal": use_causal_mask, "tile": large, "rows": rows})
        taken = self._taken
        q, k = taken((q.float() * softmax_scale).transpose(2, 3)), taken(k.float())
        values = v.transpose(2, 3) if config.should_transpose_v else v
        out = torch.zeros(rows, heads, size, width)
        largest = torch.full((rows, heads, size, 1), LOWEST)
        lse = largest.clone()
        for at in range(0, size, large):
            keys = slice(at, at + large)
            scores = q @ k[..., keys] + taken(logit_bias.float())[..., keys]
            if use_causal_mask:
                scores = scores.masked_fill(_behind(size, at, large), LOWEST)
                # Tiles of queries that stand before all of the tile's keys are left out.
                from_query = at // QUERIES * QUERIES
            else:
                from_query = 0
            rest = slice(from_query, size)
            scores, before = scores[:, :, rest], largest[:, :, rest]
            present = torch.maximum(before, scores.amax(-1, keepdim=True))
            weights = (scores - present).exp()
            sums = weights.sum(-1, keepdim=True)
            product = taken(weights) @ taken(values[:, :, keys].float())
            out[:, :, rest] = out[:, :, rest] * (before - present).exp() + product
            lse[:, :, rest] = present + ((lse[:, :, rest] - present).exp() + sums).log()
            largest[:, :, rest] = present
        out = (out * (largest - lse).exp()).to(v.dtype)
        return out, lse.view(rows, heads, -1, QUERIES).transpose(2, 3).contiguous()

    def _backward(
        self,
        grid: tuple[int, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad: Tensor,
        lse: Tensor,
        seed: None,
        logit_bias_ref: Tensor,
        use_causal_mask: bool,
        mixed_precision: bool,
        dropout_p: float,
        softmax_scale: float,
    ) -> tuple[Tensor, ...]:
        rows, heads, _, size = q.shape
        assert grid == (rows, heads) and seed is None and dropout_p == 0 and mixed_precision
        for given in (k, v, out, grad):
            assert given.shape == q.shape and given.dtype == q.dtype
        assert lse.shape == (rows, heads, QUERIES, size // QUERIES) and size % QUERIES == 0
        assert logit_bias_ref.shape == (1, 1, size, size) and logit_bias_ref.dtype == q.dtype
        self.calls.append({"forward": False, "causal": use_causal_mask, "rows": rows})
        taken, dtype = self._taken, q.dtype
        scaled = taken(q.float() * softmax_scale)
        keys, values, grads = (x.float() for x in (k, v, grad))
        scores = scaled.transpose(2, 3) @ keys + taken(logit_bias_ref.float())
        if use_causal_mask:
            scores = scores.masked_fill(_behind(size, 0, size), -9984.0)
        weights = taken((taken(scores) - lse.transpose(2, 3).reshape(rows, heads, size, 1)).exp())
        summed = (grads * out.float()).sum(2)[..., None]
        inner = taken((taken(grads.transpose(2, 3) @ values) - summed) * weights)
        of_q = (inner @ keys.transpose(2, 3)).transpose(2, 3) * softmax_scale
        of_k = (inner.transpose(2, 3) @ scaled.transpose(2, 3)).transpose(2, 3)
        of_v = (weights.transpose(2, 3) @ grads.transpose(2, 3)).transpose(2, 3)
        return of_q.to(dtype), of_k.to(dtype), of_v.to(dtype)


def _behind(size: int, at: int, keys: int) -> Tensor:
    """(S, keys): which keys, from ``at`` on, stand behind a query."""
    return torch.arange(at, at + keys) > torch.arange(size)[:, None]


@dataclass(frozen=True)
class _Launched:
    """``kernel[rows, heads](...)``."""

    kernel: Callable[..., Any]

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Any]:
        return lambda *given, **named: self.kernel(grid, *given, **named)
