"""How NKI flash attention is called, and what comes of it by what the kernel computes (nki_flash.py); the
kernel itself needs a NeuronCore."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounds import Item, key_bounds
from nki_flash import FlashConfig, StandIn
from nxd_fixture import CONFIG, Case, batches_of, gradients_of, objective, require_nxd, run_ranks, start

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.nxd.flash import (
    CausalFlashAttention,
    IntervalFlashAttention,
    NkiKernels,
    nki_kernels,
)
from nxdt_align.errors import UserError
from nxdt_align.models.presets import DecoderConfig
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


# With a bias

PACKED: list[list[Item]] = [[(200,), (17,), (290,), (-5,)], [(512,)]]
SHARED: list[list[Item]] = [[(40, 100, 60), (30, 9, 200), (60,), (-13,)], [(-512,)]]


def interval_flash(causal: bool, transposes: bool = True, rounds: bool = False) -> IntervalFlashAttention:
    kernel = StandIn(rounds)
    kernels = NkiKernels(kernel.flash_fwd, kernel.flash_attn_bwd, FlashConfig, transposes)
    return IntervalFlashAttention(kernels, causal=causal)


def with_gradients(
    attend: Any, rows: list[list[Item]], window: int | None, dtype: torch.dtype, like: torch.dtype
) -> list[torch.Tensor]:
    """What comes out for random q, k and v of 4 heads to 2 kv heads, rounded to ``like``, and the gradients
    of all three."""
    torch.manual_seed(0)
    bounds = key_bounds(rows, window)
    size = bounds[0].shape[1]
    q, k, v, w = (torch.randn(len(rows), size, heads, 16).to(like).to(dtype) for heads in (4, 2, 2, 4))
    for x in (q, k, v):
        x.requires_grad_()
    out = attend(q, k, v, attend.prepare(*bounds))
    assert out.shape == (len(rows), size, 4, 16) and out.dtype == dtype
    (out * w).sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v))]


@pytest.mark.parametrize(
    ("rows", "window", "causal"),
    [
        (PACKED, None, True),
        (PACKED, None, False),
        (PACKED, 40, True),
        (SHARED, None, False),
        ([[(1000,), (24,)]], None, True),
        ([[(700, 300, 500), (-36,)]], None, False),
    ],
    ids=["packed", "packed, not causal", "window", "shared prompt", "tile of 1024", "tiles of 512"],
)
def test_tokens_see_their_keys_and_no_others(
    rows: list[list[Item]], window: int | None, causal: bool
) -> None:
    """Values and gradients are those of a dense mask in float64, to 4e-6 of the largest."""
    wanted = with_gradients(DenseAttention(), rows, window, torch.float64, torch.float32)
    got = with_gradients(
        interval_flash(causal, transposes=window is None), rows, window, torch.float32, torch.float32
    )
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 4e-6 * theirs.abs().max()


@pytest.mark.parametrize(("rows", "causal"), [(PACKED, True), (SHARED, False)])
def test_in_bf16_as_the_tensor_engine_multiplies(rows: list[list[Item]], causal: bool) -> None:
    """A key that is not seen stays unseen with a bias that is rounded to bf16. 2% of the largest: the
    backward pass rounds scores, of 4 at most here, and so changes a probability by up to 2^-9 x 4 = 0.8%,
    before it rounds that and its gradient (0.4% each)."""
    wanted = with_gradients(DenseAttention(), rows, None, torch.float64, torch.bfloat16)
    got = with_gradients(interval_flash(causal, rounds=True), rows, None, torch.bfloat16, torch.bfloat16)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()


@pytest.mark.parametrize(
    ("rows", "tokens", "tile"), [(2, 512, 512), (1, 1024, 1024), (1, 1536, 512), (1, 2048, 2048)]
)
def test_a_call_per_row_with_the_largest_tile_that_fits(rows: int, tokens: int, tile: int) -> None:
    kernel = StandIn()
    attend = IntervalFlashAttention(
        NkiKernels(kernel.flash_fwd, kernel.flash_attn_bwd, FlashConfig, True), causal=True
    )
    x = torch.randn(rows, tokens, 1, 4, requires_grad=True)
    attend(x, x, x, attend.prepare(*key_bounds([[(tokens,)]] * rows))).sum().backward()
    ahead = {"forward": True, "causal": True, "tile": tile, "rows": 1}
    assert kernel.calls == [ahead] * rows + [{"forward": False, "causal": True, "rows": 1}] * rows


def test_rows_that_the_kernel_with_a_bias_does_not_take_are_refused() -> None:
    with pytest.raises(UserError, match=r"a multiple of 512 tokens, but a row has 640; set data\.buckets"):
        interval_flash(True).prepare(*key_bounds([[(640,)]]))


def test_the_compilers_kernels_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "neuronxcc.nki.kernels.attention"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r"flash_attention: no NKI kernel: .*update neuronx-cc"):
        nki_kernels(transposes=True)
    for parent in ("neuronxcc", "neuronxcc.nki", "neuronxcc.nki.kernels"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = ModuleType(name)
    vars(module).update(FlashConfig=FlashConfig, flash_fwd="forward", flash_attn_bwd="backward")
    monkeypatch.setitem(sys.modules, name, module)
    assert nki_kernels(transposes=False) == NkiKernels("forward", "backward", FlashConfig, False)


class EveryOther(DecoderConfig):
    """The first layer has the window, the second has not."""

    def window_of(self, layer: int) -> int | None:
        return None if layer % 2 else self.sliding_window


WELL_CONDITIONED = 8
"""Draw of pairs: see test_nxd_parallel.py."""
WINDOWED = EveryOther(**vars(replace(CONFIG, model_type="mistral", sliding_window=40)))
RUNS = {
    "packed": ("packed", "orpo", CONFIG, True),
    "shared prompt": ("shared_prompt", "dpo", CONFIG, False),
    "windows of every other layer": ("packed", "orpo", WINDOWED, True),
}


def both(case: Case, name: str) -> list[dict[str, Any]]:
    """A step with a dense mask and one with the kernel, in rows of 512 tokens."""
    layout, loss, config, causal = RUNS[name]
    found = []
    for attention in (DenseAttention(), interval_flash(causal)):
        built = start(case, config, attention=attention)
        built.load_reference(None)
        batches = batches_of(built, layout, 512, WELL_CONDITIONED)  # type: ignore[arg-type]
        output = built.step(batches, objective(loss))
        found.append({"loss": output.loss, **gradients_of(built)})
    return found


@pytest.mark.nxd
@pytest.mark.parametrize(
    ("case", "names"),
    [(Case(tp=2, sp=True), RUNS), (Case(pp=2), ["windows of every other layer"])],
    ids=["tensor", "pipeline"],
)
def test_a_step_of_the_engine_is_the_dense_masks(tmp_path: Path, case: Case, names: Sequence[str]) -> None:
    """Loss to 1e-6, and gradients to 2e-6 of the largest: both are float32, and each within 1e-6 of the plain
    model's."""
    require_nxd()
    for ranks in run_ranks(2, [(both, (case, name)) for name in names], tmp_path):
        for dense, flash in ranks:
            assert torch.allclose(flash.pop("loss"), dense.pop("loss"), rtol=0, atol=1e-6)
            largest = max(float(x.abs().max()) for x in dense.values())
            for name, gradient in flash.items():
                assert (gradient - dense[name]).abs().max() <= 2e-6 * largest, name
