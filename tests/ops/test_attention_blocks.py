"""Blocks against the dense mask: values and gradients over rows of every kind, and rows it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounds import Item, key_bounds
from torch import Tensor

from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention, _Alone

ROWS: dict[str, list[list[Item]]] = {
    "one pair": [[(20, 70, 9)]],
    "no prompt": [[(80, 0, 5), (1, 3, 1), (-4,)]],
    "one token of prompt": [[(40, 1, 30), (1, 1, 1), (9, 1, 70)]],
    "many small": [[(2, 2, 2)] * 14 + [(-6,)]],
    "padding between": [[(4, 3, 1), (-5,), (3, 90, 2), (-1,)]],
    "sequences": [[(65,), (4,), (1,), (70,), (-1,)]],
    "tokens alone": [[(1,), (1,), (30,), (1,), (40,), (1,)]],
    "only padding": [[(-5,)]],
    "two rows": [[(5, 70, 0), (-5,)], [(40, 10, 30)]],
}


def attended(attention: Attention, bounds: tuple[Tensor, Tensor], kv_heads: int) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(1)
    shape = bounds[0].shape
    q = torch.randn(*shape, 4, 16, generator=generator, requires_grad=True)
    k, v = (torch.randn(*shape, kv_heads, 16, generator=generator, requires_grad=True) for _ in range(2))
    out = attention(q, k, v, attention.prepare(*bounds))
    weights = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad((out * weights).sum(), [q, k, v], allow_unused=True)]


def compare(bounds: tuple[Tensor, Tensor], kv_heads: int) -> None:
    wanted = attended(DenseAttention(), bounds, kv_heads)
    for got, want in zip(attended(BlockAttention(), bounds, kv_heads), wanted, strict=True):
        # A row of padding alone passes v through, so q and k have no gradient there.
        torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_values_and_gradients_are_the_dense_masks(rows: str, kv_heads: int) -> None:
    compare(key_bounds(ROWS[rows]), kv_heads)


@pytest.mark.parametrize("window", [2, 7, 64, 100, 700])
def test_windows_are_the_dense_masks(window: int) -> None:
    """Over sequences longer and shorter than the window, and than the queries of one product."""
    compare(key_bounds([[(30,), (90,), (700,), (-3,)]], window), 2)


def test_any_intervals_are_the_dense_masks() -> None:
    """Drawn at random around each token: none of them of a layout."""
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(150, dtype=torch.int32)
    for reach in (1, 2, 5, 40):
        low, high = (
            torch.randint(0, reach, (2, 150), generator=generator, dtype=torch.int32) for _ in range(2)
        )
        compare(((index - low).clamp(min=0), (index + 1 + high).clamp(max=150)), 2)


def products(rows: list[list[Item]], window: int | None = None) -> list[Any]:
    blocks = BlockAttention().prepare(*key_bounds(rows, window))
    return [part for block in blocks if not isinstance(block, _Alone) for part in block.parts]


def test_a_pair_takes_two_products_with_one_stretch_of_keys_each() -> None:
    """The chosen response over itself and the prompt, behind a mask; prompt and rejected response, causal."""
    chosen, rest = products([[(20, 70, 9)]])
    assert (chosen.queries, chosen.keys, chosen.causal) == (slice(0, 20), slice(0, 90), False)
    assert (rest.queries, rest.keys, rest.causal, rest.mask) == (slice(20, 99), slice(20, 99), True, None)


def test_small_examples_share_a_block() -> None:
    blocks = BlockAttention().prepare(*key_bounds(ROWS["many small"]))
    assert len(blocks) == 3 and isinstance(blocks[-1], _Alone)
    assert sum(block.length for block in blocks) == 90


def test_a_window_leaves_out_the_keys_before_it() -> None:
    """2,000 tokens with a window of 100: no product has more keys than its queries and the window."""
    parts = products([[(2000,)]], 100)
    seen = sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in parts)
    assert seen < 2000 * 620


@pytest.mark.parametrize(
    ("bounds", "fault"),
    [
        (([0, 2, 2], [1, 3, 3]), r"row 0: token 1 sees the keys \[2, 3\), without itself"),
        (([0, 0, 0], [1, 2, 2]), r"row 0: token 2 sees the keys \[0, 2\), without itself"),
    ],
)
def test_a_token_that_does_not_see_itself_is_refused(bounds: tuple[list[int], list[int]], fault: str) -> None:
    start, stop = (torch.tensor([b], dtype=torch.int32) for b in bounds)
    with pytest.raises(ValueError, match=fault):
        BlockAttention().prepare(start, stop)


@pytest.mark.parametrize("size", [0, 5])
def test_a_row_of_padding_has_gradients_too(size: int) -> None:
    """Zeros, and not None: FSDP sums what there is, so ranks would sum different weights."""
    q, k, v = (torch.randn(1, size, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    attention = BlockAttention()
    out = attention(q, k, v, attention.prepare(*key_bounds([[(-size,)] if size else []])))
    assert out.equal(v.repeat_interleave(2, 2))
    out.sum().backward()
    for x, wanted in ((q, 0.0), (k, 0.0), (v, 2.0)):
        assert x.grad is not None and x.grad.equal(torch.full_like(x, wanted))
