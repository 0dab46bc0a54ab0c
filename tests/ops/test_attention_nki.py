"""The kernels' contract without a Trainium: the plain kernels against a dense mask, and nki-library's calls
against a stand-in that holds its signatures, shapes, dtypes and limits (snapshot d2ad3a5)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_source import STUBS
from torch import Tensor

from nxdt_align.errors import UserError
from nxdt_align.ops import attention_nki
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.attention_nki import LibraryKernels, NkiAttention, PlainKernels, operator

TOKENS = 512
PLAIN = operator(PlainKernels(), "nxdt_align_test::plain")


def bounds(seed: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Per row: a pair around its prompt (reversed, causal, both), a causal sequence, padding."""
    starts, stops = [], []
    for row in range(rows):
        generator = torch.Generator().manual_seed(seed + row)
        chosen, prompt, rejected, other = torch.randint(1, 100, (4,), generator=generator).tolist()
        start = torch.arange(TOKENS)
        stop = torch.arange(TOKENS) + 1
        end = chosen + prompt
        stop[:chosen] = end
        start[chosen : end + rejected] = chosen
        first = end + rejected
        start[first : first + other] = first
        starts.append(start)
        stops.append(stop)
    return torch.stack(starts).int(), torch.stack(stops).int()


def inputs(
    heads: int = 4, kv_heads: int = 2, size: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, TOKENS, n, size, generator=generator).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def run(attention: Any, given: list[Tensor], seed: int = 3) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    out = attention(*given, attention.prepare(*bounds(seed)))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weights)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_plain_kernels_are_a_dense_mask(kv_heads: int) -> None:
    """Packed rows, shared prompts, padding; rows with bounds of their own; several query heads to a key's."""
    given = inputs(kv_heads=kv_heads)
    for got, want in zip(run(NkiAttention(PLAIN), given), run(DenseAttention(), given), strict=True):
        assert torch.allclose(got, want, atol=2e-5), float((got - want).abs().max())


def test_bf16_keeps_its_dtype() -> None:
    given = inputs(dtype=torch.bfloat16)
    found = run(NkiAttention(PLAIN), given)
    assert {x.dtype for x in found} == {torch.bfloat16}
    exact = run(DenseAttention(), [x.detach().float().requires_grad_() for x in given])
    for got, want in zip(found, exact, strict=True):
        assert float((got.float() - want).norm() / want.norm()) < 0.01


def test_the_operator_is_one_for_torch() -> None:
    """Schema, fake tensors and autograd as torch checks them, and one graph under a compiler."""
    attention = NkiAttention(PLAIN)
    q, k, v = inputs()
    context = attention.prepare(*bounds(1))
    torch.library.opcheck(torch.ops.nxdt_align_test.plain, (q, k, v, *context))
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v, context), attention(q, k, v, context), atol=1e-6)


class Jitted:
    """What nki.jit makes: ``kernel[cores](...)``."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, cores: int) -> Any:
        assert cores in (1, 2)
        return self._function


class Library:
    """nki-library's entry points: keyword names, layouts, dtypes and limits of its sources, and what they
    compute, written out head by head."""

    def __init__(self) -> None:
        self.attention_cte, self.attention_bwd = Jitted(self._cte), Jitted(self._bwd)
        self.calls: list[str] = []

    def _cte(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal_mask: bool, tp_q: bool, tp_k: bool,
        tp_out: bool, cache_softmax: bool, bound_min: Tensor, bound_max: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        heads, size, width = q.shape
        assert tp_q and tp_k and not tp_out and cache_softmax and not causal_mask
        assert k.shape == v.shape == (len(k), size, width) and heads % len(k) == 0 and heads <= 512
        assert width <= 128 and size % 128 == 0 and all(x.is_contiguous() for x in (q, k, v))
        assert bound_min.shape == bound_max.shape == (size, 1)
        assert bound_min.dtype == bound_max.dtype == torch.float32
        self.calls.append("forward")
        index = torch.arange(size)
        out, tops, reciprocals = torch.empty_like(q), torch.empty(heads, size), torch.empty(heads, size)
        for head in range(heads):
            own = head // (heads // len(k))
            scores = (q[head] @ k[own].T) * scale
            scores = scores.masked_fill(~((index >= bound_min) & (index < bound_max)), -torch.inf)
            tops[head] = scores.max(-1).values
            weights = (scores - tops[head][:, None]).exp()
            reciprocals[head] = 1 / weights.sum(-1)
            out[head] = (weights * reciprocals[head][:, None]) @ v[own]
        tiles = (x.reshape(heads, size // 128, 128).transpose(1, 2) for x in (-tops, reciprocals))
        return out, *tiles

    def _bwd(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, dy: Tensor, lse: Tensor, *, bound_min: Tensor,
        bound_max: Tensor, use_causal_mask: bool, mixed_precision: bool, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rows, heads, width, size = q.shape
        kv_heads = k.shape[1]
        assert not use_causal_mask and mixed_precision
        assert k.shape == v.shape == (rows, kv_heads, width, size) and o.shape == dy.shape == q.shape
        assert lse.shape == (rows, heads, 128, size // 128) and lse.dtype == torch.float32
        assert q.dtype == k.dtype == v.dtype == o.dtype == dy.dtype
        assert size % 512 == 0 and all(x.is_contiguous() for x in (q, k, v, o, dy))
        assert bound_min.shape == bound_max.shape == (size,)
        assert bound_min.dtype == bound_max.dtype == torch.float32
        self.calls.append("backward")
        index = torch.arange(size)
        seen = (index >= bound_min[:, None]) & (index < bound_max[:, None])
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for head in range(heads):
            own = head // (heads // kv_heads)
            scores = (q[0, head].T @ k[0, own] * softmax_scale).masked_fill(~seen, -torch.inf)
            # Kernel and caller must mean the same by the sums.
            assert torch.allclose(scores.logsumexp(-1).view(-1, 128).T, lse[0, head], atol=1e-4)
            weights = scores.softmax(-1)
            of_weights = dy[0, head].T @ v[0, own]
            of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * softmax_scale
            dq[0, head] = (of_scores @ k[0, own].T).T
            dk[0, own] += q[0, head] @ of_scores
            dv[0, own] += dy[0, head] @ weights
        return dq, dk, dv


def test_the_librarys_kernels_are_called_as_they_want() -> None:
    library = Library()
    attend = operator(LibraryKernels(2, library), "nxdt_align_test::library")
    given = inputs()
    for got, want in zip(run(NkiAttention(attend), given), run(DenseAttention(), given), strict=True):
        assert torch.allclose(got, want, atol=2e-5)
    assert library.calls == ["forward"] * 2 + ["backward"] * 2  # a call for each row


def test_rows_and_models_that_no_kernel_takes() -> None:
    attention = NkiAttention(PLAIN)
    start, stop = (x[:, :384] for x in bounds(0))
    with pytest.raises(
        UserError, match=r"rows of a multiple of 512 tokens, but a row has 384; set data.buck"
    ):
        attention.prepare(start, stop)
    context = attention.prepare(*bounds(0))
    with pytest.raises(UserError, match=r"heads of up to 128 entries, but this model's have 256"):
        attention(*inputs(size=256), context)
    with pytest.raises(UserError, match=r"does not cap scores, as this model does \(at 50\)"):
        attention(*inputs(), context, softcap=50.0)


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    # Also where another test has put stand-ins of Neuron's packages in their place.
    for name in ("attention_cte", "attention_bwd"):
        monkeypatch.setitem(sys.modules, f"nkilib.core.attention.{name}", None)
    with pytest.raises(
        UserError, match=r"needs the package nki and nki-library, but .*brings nki, and neuronx-cc"
    ):
        LibraryKernels()


def test_under_nkis_simulator() -> None:
    """The library's own kernels where nki can be imported."""
    nki = pytest.importorskip("nki")
    if Path(getattr(nki, "__file__", None) or STUBS).is_relative_to(STUBS):
        pytest.skip("nki is a stand-in of another test's")
    attention_nki.LibraryKernels()
    kernel = pytest.importorskip("nkilib.core.attention.attention_cte").attention_cte
    q, k, v = (x.detach()[0].transpose(0, 1).contiguous().numpy() for x in inputs())
    start, stop = (x[0].float()[:, None].numpy() for x in bounds(0))
    simulated = nki.simulate(kernel)(
        q, k, v, scale=16**-0.5, causal_mask=False, tp_k=True, bound_min=start, bound_max=stop
    )
    plain, _ = PlainKernels().forward(
        *(torch.from_numpy(x) for x in (q, k, v)),
        *(torch.from_numpy(x[:, 0]) for x in (start, stop)),
        16**-0.5,
    )
    assert torch.allclose(torch.as_tensor(simulated), plain, atol=2e-2)
