"""Attention over packed rows: causal inside an example, and a response does not see its sibling.

The model calls ``attend(q, k, v, context)``; what ``context`` is belongs to the kind of attention
chosen here, prepared once for a batch. Legend: ``B`` rows, ``S`` tokens, ``N`` query heads, ``K``
key-value heads, ``H`` head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nxdt_align.batch import PADDING_SEGMENT, SEGMENT_STRIDE


class Attention(Protocol):
    """One way to compute attention over packed rows."""

    @property
    def static_shapes(self) -> bool:
        """Whether rows must keep their shapes; else the caller may leave out padding."""
        ...

    def prepare(self, segment_ids: Tensor) -> Any:
        """The context of a batch with these segments, (B, S)."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        """q (B, S, N, H), k and v (B, S, K, H) -> (B, S, N, H)."""
        ...


def visibility(segment_ids: Tensor) -> Tensor:
    """Which token sees which: (B, S, S) bool, [b, i, j] true where token i attends to token j.

    A token sees itself, and earlier tokens of its own segment and of its example's prompt. Padding
    sees itself alone, so that no softmax row is ever all masked.
    """
    size = segment_ids.shape[1]
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    is_prompt_of_same_example = (key % SEGMENT_STRIDE == 0) & (
        query // SEGMENT_STRIDE == key // SEGMENT_STRIDE
    )
    related = (query == key) | is_prompt_of_same_example
    index = torch.arange(size, device=segment_ids.device)
    causal = index[:, None] >= index[None, :]
    itself = index[:, None] == index[None, :]
    return (related & causal & (query != PADDING_SEGMENT)) | itself


class DenseAttention:
    """A dense mask and PyTorch's scaled_dot_product_attention: static shapes, every device."""

    static_shapes = True

    def prepare(self, segment_ids: Tensor) -> Tensor:
        return visibility(segment_ids)[:, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=context).transpose(1, 2)
