"""NKI flash attention, for rows that hold one sequence each.

Legend: ``B`` rows, ``S`` tokens, ``N`` query heads, ``K`` key-value heads, ``H`` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nxdt_align.engines.base import EngineError
from nxdt_align.ops.attention import CausalAttention

Kernel = Callable[..., Tensor]
"""neuronx_distributed's nki_flash_attn_func: (B, N, H, S) each, or with transpose_nki_inputs=False
(B, N, S, H) -> (B, N, S, H)."""
TILE = 2048
"""The kernel takes rows of a multiple of so many tokens."""


def nki_kernel() -> Kernel:
    """NxD's. Raises EngineError where the compiler's kernels are missing."""
    try:
        from neuronx_distributed.kernels.flash_attn import nki_flash_attn_func
    except ImportError as error:
        raise EngineError(
            f"model.fusions.flash_attention: no NKI kernel: {error}; update neuronx-cc, or "
            "set model.fusions.flash_attention=False"
        ) from error
    kernel: Kernel = nki_flash_attn_func
    return kernel


def traced_kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, transpose_nki_inputs: bool) -> Tensor:
    """A Kernel that computes nothing: it stands in recorded graphs, as the custom calls nki_flash_fwd and
    nki_flash_bwd."""
    result: Tensor = _TracedFlash.apply(q, k, v, transpose_nki_inputs)  # type: ignore[no-untyped-call]
    return result


class _TracedFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, transposed: bool) -> Tensor:
        rows, heads, *rest = q.shape
        shape = (rows, heads, *(reversed(rest) if transposed else rest))
        out, norms = _custom_call("nki_flash_fwd", [q, k, v], [shape, shape[:3]], [q.dtype, torch.float32])
        ctx.save_for_backward(q, k, v, out, norms)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        like = given[:3]
        found = _custom_call(
            "nki_flash_bwd", [*given, grad], [x.shape for x in like], [x.dtype for x in like]
        )
        return *found, None


def _custom_call(
    name: str, given: list[Tensor], shapes: list[Any], dtypes: list[torch.dtype]
) -> list[Tensor]:
    from torch_xla.experimental.stablehlo_custom_call import stablehlo_custom_call

    result: list[Tensor] = stablehlo_custom_call(given, name, [list(shape) for shape in shapes], dtypes)
    return result


class CausalFlashAttention(CausalAttention):
    """``CausalAttention`` by NxD's kernel.

    ``transpose_inputs``: whether the kernel gets them as it computes with them, or transposes them itself.
    """

    def __init__(self, kernel: Kernel, *, transpose_inputs: bool = True) -> None:
        super().__init__(TILE, "model.fusions.flash_attention=False")
        self._kernel = kernel
        self._transpose = transpose_inputs

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, context: None, softcap: float | None = None
    ) -> Tensor:
        """q (B, S, N, H), k and v (B, S, K, H) -> (B, S, N, H)."""
        self.refuse_softcap(softcap)
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        order = (0, 2, 3, 1) if self._transpose else (0, 2, 1, 3)
        q, k, v = (x.permute(order) for x in (q, k, v))
        return self._kernel(q, k, v, causal=True, transpose_nki_inputs=self._transpose).transpose(1, 2)
