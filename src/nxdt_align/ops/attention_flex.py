"""Attention by intervals as PyTorch's FlexAttention: a compiled kernel that skips masked blocks.

For CUDA, where it is compiled; static shapes, and nothing is read on the host. Uncompiled it is a
dense reference that runs anywhere, slowly: that is what tests compare off CUDA. Legend as in
``attention.py``. https://pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from nxdt_align.ops.attention import softcapped

BLOCK = 128
"""Tokens of a block, of queries and of keys alike: the kernel's default."""


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function per process: each shape of a bucket adds a graph of its own."""
    return torch.compile(function, dynamic=False)


class FlexAttention:
    """FlexAttention with a block mask made of the bounds.

    Args:
        compiled: by torch.compile, as CUDA needs it for speed.
    """

    static_shapes = True

    def __init__(self, compiled: bool = True) -> None:
        attend: Callable[..., Any] = flex_attention
        self._attend = _compiled(attend) if compiled else attend

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> BlockMask:
        return block_mask(key_start, key_stop)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any, softcap: float | None = None) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        cap = None if softcap is None else _cap(softcap)
        out: Tensor = self._attend(q, k, v, score_mod=cap, block_mask=context, enable_gqa=grouped)
        return out.transpose(1, 2)


@cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    """One function per cap: torch.compile makes a graph of each that it meets."""

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcapped(score, softcap)

    return capped


def block_mask(key_start: Tensor, key_stop: Tensor) -> BlockMask:
    """The block mask of rows with these bounds, (B, S) int32 each.

    Blocks of queries and keys are compared by their first and last bounds, S / 128 squared numbers per row,
    where ``create_block_mask`` asks for each of the S squared pairs of tokens.
    """
    rows, size = key_start.shape
    blocks = -(-size // BLOCK)
    beyond = (0, blocks * BLOCK - size)

    def of_blocks(bound: Tensor, value: int) -> Tensor:
        return pad(bound, beyond, value=value).view(rows, blocks, BLOCK)

    first = torch.arange(0, blocks * BLOCK, BLOCK, dtype=key_start.dtype, device=key_start.device)
    # Queries beyond the row see nothing, and forbid nothing.
    earliest, latest = of_blocks(key_start, size).amin(-1), of_blocks(key_stop, 0).amax(-1)
    seen = (first < latest[:, :, None]) & (first + BLOCK > earliest[:, :, None])
    earliest, latest = of_blocks(key_start, 0).amax(-1), of_blocks(key_stop, blocks * BLOCK).amin(-1)
    full = (first >= earliest[:, :, None]) & (first + BLOCK <= latest[:, :, None])

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= key_start[b, i]) & (j < key_stop[b, i])

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full),
        *_listed(seen & full),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(size, size),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (B, 1, Q), and which, (B, 1, Q, K): int32."""
    order = torch.argsort(chosen.to(torch.int32), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()
