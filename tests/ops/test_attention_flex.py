"""FlexAttention's mask and values. Off CUDA torch runs it forward alone, and uncompiled: tests/cuda
has the kernel itself."""

from __future__ import annotations

import pytest
import torch
from bounds import Item, key_bounds
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.attention_flex import FlexAttention, block_mask

ROWS: list[list[Item]] = [[(20, 60, 9), (51,), (-10,)], [(140,), (-10,)]]
"""Of 150 tokens, so that the block mask (128 x 128) has whole, partial and empty blocks."""


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 17])
def test_values_are_the_dense_masks(kv_heads: int, window: int | None) -> None:
    bounds = key_bounds(ROWS, window)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 150, 4, 16, generator=generator)
    k, v = (torch.randn(2, 150, kv_heads, 16, generator=generator) for _ in range(2))
    dense, flex = DenseAttention(), FlexAttention(compiled=False)
    torch.testing.assert_close(flex(q, k, v, flex.prepare(*bounds)), dense(q, k, v, dense.prepare(*bounds)))


@pytest.mark.parametrize(
    ("rows", "window"),
    [
        (ROWS, None),
        (ROWS, 17),
        ([[(300, 500, 400), (80,)]], None),
        ([[(700,), (-400,), (180,)]], 256),
        ([[(384,), (128, 128, 128)]], None),
    ],
)
def test_the_block_mask_is_that_of_every_pair_of_tokens(rows: list[list[Item]], window: int | None) -> None:
    """Off CUDA no kernel skips a block, so that values would not show a wrong one."""
    start, stop = key_bounds(rows, window)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= start[b, i]) & (j < stop[b, i])

    size = start.shape[1]
    wanted = create_block_mask(sees, len(rows), None, size, size, device="cpu")
    got = block_mask(start, stop)
    assert got.shape == wanted.shape
    assert listed(got.kv_num_blocks, got.kv_indices) == listed(wanted.kv_num_blocks, wanted.kv_indices)
    assert listed(got.full_kv_num_blocks, got.full_kv_indices) == listed(
        wanted.full_kv_num_blocks, wanted.full_kv_indices
    )
    assert listed(got.q_num_blocks, got.q_indices) == listed(wanted.q_num_blocks, wanted.q_indices)


def listed(counts: Tensor | None, indices: Tensor | None) -> list[list[int]]:
    assert counts is not None and indices is not None
    rows = zip(counts.flatten().tolist(), indices.flatten(0, 2).tolist(), strict=True)
    return [row[:count] for count, row in rows]
