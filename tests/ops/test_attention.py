"""Who sees whom by its bounds, written out by hand, and the backends of any device against a plain loop."""

from __future__ import annotations

import pytest
import torch
from bounds import key_bounds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nxdt_align.errors import UserError
from nxdt_align.ops.attention import (
    CausalAttention,
    DenseAttention,
    masked_attention,
    pad_bounds,
    visibility,
)

PAIR_AND_SEQUENCE = [[(2, 2, 1), (2,), (-2,)]]


def test_visibility_of_a_row_with_a_pair_a_sequence_and_padding() -> None:
    """Row: chosen reversed(2) prompt(2) rejected(1) | sequence(2) | padding(2)."""
    sees = {
        0: {
            0,
            1,
            2,
            3,
        },  # the chosen response's last token: those behind it, which precede it, and the prompt
        1: {1, 2, 3},
        2: {2},
        3: {2, 3},
        4: {2, 3, 4},  # the rejected response sees the prompt, not its sibling
        5: {5},  # another example
        6: {5, 6},
        7: {7},
        8: {8},
    }
    mask = visibility(*key_bounds(PAIR_AND_SEQUENCE))[0]
    for query, keys in sees.items():
        assert set(torch.nonzero(mask[query]).squeeze(1).tolist()) == keys


def test_padding_that_is_added_sees_itself_alone() -> None:
    wanted = key_bounds([[(2, 2, 1), (2,), (-5,)]])
    padded = pad_bounds(*key_bounds(PAIR_AND_SEQUENCE), 3)
    assert all(got.equal(want) and got.dtype == torch.int32 for got, want in zip(padded, wanted, strict=True))


def drawn(size: int, heads: int = 4, kv_heads: int = 2, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, size, n, width) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def loop(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    shared, out = q.shape[2] // k.shape[2], torch.empty_like(q)
    for i in range(q.shape[1]):
        keys = torch.nonzero(mask[i]).squeeze(1)
        for head in range(q.shape[2]):
            scores = k[0, keys, head // shared] @ q[0, i, head] / q.shape[-1] ** 0.5
            out[0, i, head] = scores.softmax(0) @ v[0, keys, head // shared]
    return out


@pytest.mark.parametrize("written_out", [False, True])
def test_dense_attention_equals_a_loop_over_queries_with_grouped_heads(written_out: bool) -> None:
    bounds = key_bounds([[(1, 2, 3), (-1,)]])
    mask = visibility(*bounds)
    wanted = drawn(7)
    expected = loop(*wanted, mask[0])
    expected.square().sum().backward()
    got = drawn(7)
    dense = DenseAttention()
    context = dense.prepare(*bounds)
    out = masked_attention(*got, context) if written_out else dense(*got, context)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


class Products(TorchDispatchMode):
    """The dtypes of matrix products, forward and backward, and of what softmax gives."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[torch.dtype] = []
        self.softmax: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        if "mm" in name or "matmul" in name:
            self.products += [x.dtype for x in (*args, out) if isinstance(x, Tensor)]
        if name.startswith("_softmax."):
            self.softmax.append(out.dtype)
        return out


def test_under_bf16_products_are_in_bf16_and_the_softmax_in_float32() -> None:
    """Where a device has no fused kernel, PyTorch's own decomposition multiplies in float32."""
    bounds = key_bounds([[(5, 20, 7)]])
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in drawn(32))
    with Products() as seen:
        out = masked_attention(q, k, v, DenseAttention().prepare(*bounds))
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert len(seen.products) == 6 * 3 and set(seen.products) == {torch.bfloat16}
    assert seen.softmax == [torch.float32]
    exact = DenseAttention()(q.float(), k.float(), v.float(), DenseAttention().prepare(*bounds))
    assert (out.float() - exact).abs().max() < 0.03


def test_the_way_to_a_mask_has_two_comparisons_and_no_64_bit_integer() -> None:
    seen: list[tuple[str, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            seen.append((func.__name__.partition(".")[0], out.dtype))
            return out

    bounds = key_bounds(PAIR_AND_SEQUENCE)
    with Watch():
        DenseAttention().prepare(*bounds)
        pad_bounds(*bounds, 3)
    assert torch.int64 not in {dtype for _, dtype in seen}
    names = {name for name, _ in seen}
    assert names <= {
        "arange",
        "ge",
        "lt",
        "bitwise_and",
        "__and__",
        "slice",
        "unsqueeze",
        "expand",
        "cat",
        "add",
    }


def test_causal_attention_is_right_in_rows_of_one_sequence_and_its_padding() -> None:
    bounds = key_bounds([[(5,), (-3,)]])
    q, k, v = drawn(8)
    causal, dense = CausalAttention(8), DenseAttention()
    context = causal.prepare(*bounds)
    assert context is None
    out, wanted = causal(q, k, v, context), dense(q, k, v, dense.prepare(*bounds))
    torch.testing.assert_close(out[:, :5], wanted[:, :5])
    # No gradient reaches padding from a real token.
    grads = torch.autograd.grad(out[:, :5].sum(), [k, v])
    assert all(grad[:, 5:].eq(0).all() for grad in grads)


def test_rows_that_a_flash_kernel_does_not_take_are_named() -> None:
    with pytest.raises(UserError, match=r"multiple of 512 tokens, but a row has 700; set data.seq_length"):
        CausalAttention(512).prepare(*key_bounds([[(700,)]]))
