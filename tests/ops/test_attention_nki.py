"""The kernels' contract without a Trainium: the plain kernels against a dense mask, and nki-library's calls
against a stand-in that holds its signatures, shapes, dtypes and limits (snapshot d2ad3a5)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_source import STUBS
from torch import Tensor

from nxdt_align.errors import UserError
from nxdt_align.models.decoder import Attention, RotaryEmbedding
from nxdt_align.models.presets import TINY
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.attention_nki import (
    LibraryKernels,
    NkiAttention,
    PlainKernels,
    copies_of_keys,
    operator,
)

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


def test_autocast_with_head_norms() -> None:
    """Which leave queries and keys in float32 and values in bf16; attention_bwd takes one dtype."""
    model = replace(TINY, qk_norm="head")
    positions = torch.arange(TOKENS).expand(2, -1)
    hidden = torch.randn(2, TOKENS, model.hidden_size, generator=torch.Generator().manual_seed(2))
    found: list[list[Tensor]] = []
    for attention, is_cast in ((NkiAttention(PLAIN), True), (DenseAttention(), False)):
        dtypes: list[torch.dtype] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, context: Any, attention: Any = attention) -> Tensor:
            dtypes[:] = [q.dtype, k.dtype, v.dtype]  # noqa: B023
            return attention(q, k, v, context)  # type: ignore[no-any-return]

        torch.manual_seed(0)
        layer = Attention(model, attend)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            out = layer(hidden, RotaryEmbedding(model)(positions), attention.prepare(*bounds(3)))
        assert dtypes == ([torch.float32] * 2 + [torch.bfloat16 if is_cast else torch.float32])
        found.append([out, *torch.autograd.grad(out.float().square().sum(), list(layer.parameters()))])
    for got, want in zip(*found, strict=True):
        assert float((got.float() - want).norm() / want.norm()) < 0.02


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
        assert scale == 1.0  # with bounds its scores go through range_select, which has no scale
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
        self.calls.append(f"backward, {kv_heads} key-value heads")
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


@pytest.mark.parametrize(("kv_heads", "handed"), [(1, 2), (2, 2), (4, 4)])
def test_the_librarys_kernels_are_called_as_they_want(kv_heads: int, handed: int) -> None:
    """A call for each row; backward with a key-value head for each of two cores at least."""
    library = Library()
    attend = operator(LibraryKernels(2, library), f"nxdt_align_test::library_{kv_heads}")
    given = inputs(kv_heads=kv_heads)
    for got, want in zip(run(NkiAttention(attend), given), run(DenseAttention(), given), strict=True):
        assert torch.allclose(got, want, atol=2e-5)
    assert library.calls == ["forward"] * 2 + [f"backward, {handed} key-value heads"] * 2


@pytest.mark.parametrize(
    ("heads", "kv_heads", "cores", "copies"),
    [
        *((4, 1, 2, 2), (6, 3, 2, 2)),
        *((4, 1, 1, 1), (4, 2, 2, 1), (4, 4, 2, 1)),
        *((1, 1, 2, 1), (7, 1, 2, 1)),  # query heads that two cores cannot share evenly
    ],
)
def test_key_value_heads_are_copied_where_a_core_would_wait(
    heads: int, kv_heads: int, cores: int, copies: int
) -> None:
    assert copies_of_keys(heads, kv_heads, cores) == copies


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


class Simulated:
    """nki-library's own kernels on a CPU: ``kernel[cores](...)`` of torch tensors, as nki.simulate takes
    them from Neuron 2.30 on."""

    def __init__(self, nki: Any, kernel: Any) -> None:
        self._nki, self._kernel = nki, kernel

    def __getitem__(self, cores: int) -> Callable[..., tuple[Tensor, ...]]:
        simulated = self._nki.simulate(self._kernel[cores])
        return lambda *args, **named: tuple(torch.as_tensor(x) for x in simulated(*args, **named))


class SimulatedLibrary:
    def __init__(self, nki: Any) -> None:
        for name in ("attention_cte", "attention_bwd"):
            kernel = getattr(pytest.importorskip(f"nkilib.core.attention.{name}"), name)
            setattr(self, name, Simulated(nki, kernel))


@pytest.mark.nki
@pytest.mark.parametrize(
    "cores, heads, kv_heads", [(1, 2, 1), (2, 2, 1), (2, 2, 2)], ids=["one core", "two cores", "two pairs"]
)
def test_under_nkis_simulator(monkeypatch: pytest.MonkeyPatch, cores: int, heads: int, kv_heads: int) -> None:
    """The library's own kernels, forward and backward, through the calls of a run, in bf16."""
    nki = pytest.importorskip("nki")
    if Path(getattr(nki, "__file__", None) or STUBS).is_relative_to(STUBS):
        pytest.skip("nki is a stand-in of another test's")
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    library = SimulatedLibrary(nki)
    attend = operator(LibraryKernels(cores, library), f"nxdt_align_test::simulated_{cores}_{kv_heads}")
    given = inputs(heads, kv_heads, size=64, dtype=torch.bfloat16)
    found = run(NkiAttention(attend), given)
    exact = run(DenseAttention(), [x.detach().float().requires_grad_() for x in given])
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.float() - want).norm() / want.norm()) < 0.02
