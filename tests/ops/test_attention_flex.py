"""FlexAttention's mask and values. Off CUDA torch runs it forward alone, and uncompiled: see test_layouts.py
for the kernel itself, which needs CUDA."""

from __future__ import annotations

import pytest
import torch

from nxdt_align.batch import PADDING_SEGMENT, SEGMENT_STRIDE
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.attention_flex import FlexAttention


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_values_are_the_dense_masks(kv_heads: int) -> None:
    """Two rows of 150 tokens, so that the block mask (128 x 128) has whole, partial and empty blocks."""
    parts = [(0, 60), (1, 20), (2, 9), (SEGMENT_STRIDE, 40), (SEGMENT_STRIDE + 1, 11), (PADDING_SEGMENT, 10)]
    row = torch.cat([torch.full((n,), segment) for segment, n in parts])
    other = torch.cat([torch.zeros(140, dtype=torch.long), torch.full((10,), PADDING_SEGMENT)])
    segment_ids = torch.stack([row, other])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 150, 4, 16, generator=generator)
    k, v = (torch.randn(2, 150, kv_heads, 16, generator=generator) for _ in range(2))
    dense, flex = DenseAttention(), FlexAttention(compiled=False)
    torch.testing.assert_close(
        flex(q, k, v, flex.prepare(segment_ids)), dense(q, k, v, dense.prepare(segment_ids))
    )
