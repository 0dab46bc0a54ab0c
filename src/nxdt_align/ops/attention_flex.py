"""Attention over packed rows as PyTorch's FlexAttention: a compiled kernel that skips masked blocks.

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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nxdt_align.batch import PADDING_SEGMENT, SEGMENT_STRIDE


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function a process: each shape of a bucket adds a graph of its own."""
    return torch.compile(function, dynamic=False)


class FlexAttention:
    """FlexAttention with a block mask from the segment ids.

    Args:
        compiled: by torch.compile, as CUDA needs it for speed.
    """

    static_shapes = True

    def __init__(self, compiled: bool = True) -> None:
        attend: Callable[..., Any] = flex_attention
        create: Callable[..., Any] = create_block_mask
        self._attend = _compiled(attend) if compiled else attend
        self._create = _compiled(create) if compiled else create

    def prepare(self, segment_ids: Tensor) -> BlockMask:
        rows, size = segment_ids.shape

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            query, key = segment_ids[b, i], segment_ids[b, j]
            is_prompt_of_same_example = (key % SEGMENT_STRIDE == 0) & (
                query // SEGMENT_STRIDE == key // SEGMENT_STRIDE
            )
            related = (query == key) | is_prompt_of_same_example
            return (related & (i >= j) & (query != PADDING_SEGMENT)) | (i == j)

        mask: BlockMask = self._create(sees, rows, None, size, size, device=segment_ids.device)
        return mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = self._attend(q, k, v, block_mask=context, enable_gqa=grouped)
        return out.transpose(1, 2)
