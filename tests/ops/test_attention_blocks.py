"""Blocks against the dense mask: values and gradients over rows of every kind, and rows it must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nxdt_align.batch import PADDING_SEGMENT, SEGMENT_STRIDE
from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention, _Masked

ROWS: dict[str, list[list[tuple[int, int, int]]]] = {
    # (example, part, tokens); example -1 is padding
    "one pair": [[(0, 0, 70), (0, 1, 20), (0, 2, 9)]],
    "no prompt": [[(0, 1, 80), (0, 2, 5), (1, 0, 3), (1, 1, 1), (1, 2, 1), (-1, 0, 4)]],
    "many small": [[(e, p, 2) for e in range(14) for p in range(3)] + [(-1, 0, 6)]],
    "padding between": [[(0, 0, 3), (0, 1, 4), (-1, 0, 5), (1, 0, 90), (1, 1, 3), (1, 2, 2), (-1, 0, 1)]],
    "three responses": [[(0, 0, 65), (0, 1, 4), (0, 2, 1), (0, 3, 7)]],
    "only padding": [[(-1, 0, 5)]],
    "two rows": [[(0, 0, 70), (0, 1, 5), (-1, 0, 5)], [(0, 0, 10), (0, 1, 40), (0, 2, 30)]],
}


def segments(rows: list[list[tuple[int, int, int]]]) -> Tensor:
    def ids(row: list[tuple[int, int, int]]) -> list[int]:
        named = [(PADDING_SEGMENT if e < 0 else e * SEGMENT_STRIDE + p, n) for e, p, n in row]
        return [segment for segment, count in named for _ in range(count)]

    return torch.tensor([ids(row) for row in rows])


def attended(attention: Attention, segment_ids: Tensor, kv_heads: int) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(1)
    shape = segment_ids.shape
    q = torch.randn(*shape, 4, 16, generator=generator, requires_grad=True)
    k, v = (torch.randn(*shape, kv_heads, 16, generator=generator, requires_grad=True) for _ in range(2))
    out = attention(q, k, v, attention.prepare(segment_ids))
    weights = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad((out * weights).sum(), [q, k, v], allow_unused=True)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_values_and_gradients_are_the_dense_masks(rows: str, kv_heads: int) -> None:
    segment_ids = segments(ROWS[rows])
    wanted = attended(DenseAttention(), segment_ids, kv_heads)
    for got, want in zip(attended(BlockAttention(), segment_ids, kv_heads), wanted, strict=True):
        # A row of padding alone passes v through, so q and k have no gradient there.
        torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want, atol=2e-6, rtol=1e-5)


def test_small_examples_share_a_block() -> None:
    blocks = BlockAttention().prepare(segments(ROWS["many small"]))
    assert len([b for b in blocks if isinstance(b, _Masked)]) == 2
    assert sum(b.length for b in blocks) == 90


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([(0, 0, 2), (1, 0, 2), (0, 1, 2)], "segments of example 0 do not stand together"),
        ([(0, 0, 2), (0, 1, 2), (0, 0, 2)], "tokens of segment 0 do not stand together"),
        ([(0, 1, 2), (0, 0, 2)], "prompt of segment 0 stands after its responses"),
    ],
)
def test_rows_that_are_no_blocks_are_refused(row: list[tuple[int, int, int]], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        BlockAttention().prepare(segments([row]))


@pytest.mark.parametrize("size", [0, 5])
def test_a_row_of_padding_has_gradients_too(size: int) -> None:
    """Zeros, and not None: FSDP sums what there is, so ranks would sum different weights."""
    q, k, v = (torch.randn(1, size, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    attention = BlockAttention()
    out = attention(q, k, v, attention.prepare(torch.full((1, size), PADDING_SEGMENT)))
    assert out.equal(v.repeat_interleave(2, 2))
    out.sum().backward()
    for x, wanted in ((q, 0.0), (k, 0.0), (v, 2.0)):
        assert x.grad is not None and x.grad.equal(torch.full_like(x, wanted))
