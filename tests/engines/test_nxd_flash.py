"""How NKI flash attention is called; the kernel itself needs a NeuronCore."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bounds import key_bounds

from nxdt_align.engines.nxd.flash import CausalFlashAttention
from nxdt_align.errors import UserError
from nxdt_align.ops.attention import DenseAttention


def kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, transpose_nki_inputs: bool
) -> torch.Tensor:
    """What NxD's nki_flash_attn_func computes: (B, N, H, S) -> (B, N, S, H) with transposed inputs, else
    (B, N, S, H) -> (B, N, S, H)."""
    assert causal
    if transpose_nki_inputs:
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("transpose", [True, False])
def test_real_tokens_are_attended_over_as_with_the_dense_mask(transpose: bool) -> None:
    """A sequence of 5 tokens and 3 of padding; 4 query heads to 2 kv heads."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    dense = DenseAttention()
    wanted = dense(q, k, v, dense.prepare(*key_bounds([[(5,), (-3,)]] * 2)))
    got = CausalFlashAttention(kernel, transpose_inputs=transpose)(q, k, v, None)
    assert got.shape == (2, 8, 4, 16)
    assert torch.allclose(got[:, :5], wanted[:, :5], atol=1e-6)


def test_rows_that_the_kernel_does_not_take_are_refused() -> None:
    CausalFlashAttention(kernel).prepare(*key_bounds([[(4096,)]]))
    with pytest.raises(UserError, match="a multiple of 2048 tokens, but a row has 4000"):
        CausalFlashAttention(kernel).prepare(*key_bounds([[(4000,)]]))
