"""Who sees whom in a packed row, written out by hand, and dense attention against a plain loop."""

from __future__ import annotations

import torch

from nxdt_align.batch import PADDING_SEGMENT, SEGMENT_STRIDE
from nxdt_align.ops.attention import DenseAttention, visibility

P, C, R = 0, 1, 2
SECOND = SEGMENT_STRIDE


def test_visibility_of_a_row_with_two_examples_and_padding() -> None:
    """Row: prompt(2) chosen(2) rejected(1) | example 2: prompt(1) chosen(1) | padding(2)."""
    segments = torch.tensor([[P, P, C, C, R, SECOND + P, SECOND + C, PADDING_SEGMENT, PADDING_SEGMENT]])
    sees = {
        0: {0},
        1: {0, 1},
        2: {0, 1, 2},
        3: {0, 1, 2, 3},
        4: {0, 1, 4},  # the rejected response sees the prompt, not its sibling
        5: {5},  # another example
        6: {5, 6},
        7: {7},
        8: {8},
    }
    mask = visibility(segments)[0]
    for query, keys in sees.items():
        assert set(torch.nonzero(mask[query]).squeeze(1).tolist()) == keys


def test_dense_attention_equals_a_loop_over_queries_with_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([[P, P, C, R, R, PADDING_SEGMENT]])
    q = torch.randn(1, 6, 4, 8, generator=generator)
    k, v = (torch.randn(1, 6, 2, 8, generator=generator) for _ in range(2))
    attention = DenseAttention()
    out = attention(q, k, v, attention.prepare(segments))
    mask = visibility(segments)[0]
    for i in range(6):
        for head in range(4):
            keys = torch.nonzero(mask[i]).squeeze(1)
            scores = k[0, keys, head // 2] @ q[0, i, head] / 8**0.5
            torch.testing.assert_close(out[0, i, head], scores.softmax(0) @ v[0, keys, head // 2])
