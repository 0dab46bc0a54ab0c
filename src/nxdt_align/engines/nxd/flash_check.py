"""The flash kernel with a bias beside a dense mask, on the device where it runs: values and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nxdt_align.engines.nxd.flash import BiasedKernels, IntervalFlashAttention
from nxdt_align.ops.attention import Attention, DenseAttention

TOLERANCE = 0.03
"""Of the largest value: the kernel multiplies in bf16, and rounds scores to it in the backward pass."""
_SHAPES = {"packed": (512, True), "shared prompt": (1024, False), "window": (2048, True)}
"""Rows -> their tokens, and whether no token sees keys behind it."""
HEADS, WIDTH = 2, 128


@dataclass(frozen=True)
class Difference:
    rows: str
    of: str
    """What differs: values, or the gradient of an input."""
    largest: float
    """Difference, over the largest value."""

    @property
    def is_right(self) -> bool:
        # Written so that NaN is wrong.
        return self.largest <= TOLERANCE

    def __str__(self) -> str:
        verdict = "right" if self.is_right else f"WRONG: more than {TOLERANCE:g}"
        return f"{self.rows}, {self.of}: {self.largest:.2g} of the largest, {verdict}"


def differences(kernels: BiasedKernels, device: torch.device) -> list[Difference]:
    """Of bf16 on ``device`` from float32 with a dense mask on the CPU, of the same random q, k and v."""
    found = []
    for rows, (tokens, causal) in _SHAPES.items():
        bounds = _bounds(rows, tokens)
        ours = _with_gradients(IntervalFlashAttention(kernels, causal=causal), bounds, torch.bfloat16, device)
        exact = _with_gradients(DenseAttention(), bounds, torch.float32, torch.device("cpu"))
        for of, one, other in zip(("values", "gradient of q", "of k", "of v"), ours, exact, strict=True):
            largest = float((one - other).abs().max() / other.abs().max())
            found.append(Difference(rows, of, largest))
    return found


def _bounds(rows: str, tokens: int) -> tuple[Tensor, Tensor]:
    """(1, S) int32 each."""
    at = torch.arange(tokens, dtype=torch.int32)
    start, stop = torch.zeros_like(at), at + 1
    if rows == "packed":
        start[tokens // 3 :] = tokens // 3
    elif rows == "window":
        start = (at - 127).clamp(min=0)
    else:
        # A chosen response, last token first, its prompt, and the rejected one.
        prompt, rejected = tokens // 4, tokens // 2
        start = torch.where(at < prompt, at, prompt)
        stop = torch.where(at < prompt, rejected, stop)
    return start[None], stop[None]


def _with_gradients(
    attend: Attention, bounds: tuple[Tensor, Tensor], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (1, bounds[0].shape[1], HEADS, WIDTH)
    # Rounded first, so that both compute with the same numbers.
    q, k, v, weight = (
        torch.randn(size, generator=generator).bfloat16().to(device=device, dtype=dtype) for _ in range(4)
    )
    given = [x.requires_grad_() for x in (q, k, v)]
    context = attend.prepare(*(bound.to(device) for bound in bounds))
    out = attend(given[0], given[1], given[2], context)
    gradients = torch.autograd.grad((out * weight).sum(), given)
    return [x.detach().cpu().float() for x in (out, *gradients)]
