"""NKI flash attention: NxD's call of the kernels for rows that hold one sequence each, and a call of our own,
with a bias, for rows in which tokens see other intervals of keys.

Legend: ``B`` rows, ``S`` tokens, ``N`` query heads, ``K`` key-value heads, ``H`` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nxdt_align.engines.base import EngineError
from nxdt_align.errors import UserError
from nxdt_align.ops.attention import CausalAttention, visibility

Kernel = Callable[..., Tensor]
"""neuronx_distributed's nki_flash_attn_func: (B, N, H, S) each, or with transpose_nki_inputs=False
(B, N, S, H) -> (B, N, S, H)."""
TILE = 2048
"""NxD's call of the kernel takes rows of a multiple of so many tokens."""
BIASED_TILE = 512
"""Ours does, whose tiles are as small as the kernel's can be."""
MAX_HEAD = 128
"""The largest head that the kernel takes."""
MASKED = -(2.0**100)
"""Added to the score of a key that a token does not see. Exact in bf16, as the kernel keeps a bias; its
exponential is 0 beside any score, and no sum with one leaves the range."""


def nki_kernel() -> Kernel:
    """NxD's. Raises EngineError where the compiler's kernels are missing."""
    try:
        from neuronx_distributed.kernels.flash_attn import nki_flash_attn_func
    except ImportError as error:
        raise _no_kernel(error) from error
    kernel: Kernel = nki_flash_attn_func
    return kernel


def _no_kernel(error: ImportError) -> EngineError:
    return EngineError(
        f"model.fusions.flash_attention: no NKI kernel: {error}; update neuronx-cc, or "
        "set model.fusions.flash_attention=False"
    )


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
    name: str, given: list[Tensor], shapes: list[Any], dtypes: list[torch.dtype], config: str = ""
) -> list[Tensor]:
    from torch_xla.experimental.stablehlo_custom_call import stablehlo_custom_call

    result: list[Tensor] = stablehlo_custom_call(
        given, name, [list(shape) for shape in shapes], dtypes, backend_config=config
    )
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


# With a bias


class BiasedKernels(Protocol):
    """The kernel of one row (B is 1), and its gradients'. ``bias`` (1, 1, S, S) is added to the scores, which
    are scaled by 1 / sqrt(H) before; with ``causal``, keys behind a token are left out besides, and so are
    tiles that hold none but those."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q, k, v (B, N, H, S) -> out (B, N, S, H) and what the backward pass needs of it."""
        ...

    def backward(
        self,
        *given: Tensor,
        bias: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, out and its gradient, (B, N, H, S) each, and forward's second result -> the gradients of
        q, k and v, (B, N, H, S)."""
        ...


@dataclass(frozen=True)
class NkiKernels:
    """The compiler's, called as NxD's wrapper calls them, which passes no bias on.

    https://github.com/aws-neuron/nki-samples (reference/attention.py, before January 2026) has their source.
    """

    flash_fwd: Any
    flash_attn_bwd: Any
    flash_config: Any
    transposes: bool
    """Whether the kernel takes v (B, N, H, S) and transposes it, or (B, N, S, H)."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        rows, heads, width, size = q.shape
        # lse_dtype is left as it is, float32, because every probability of the backward pass is made of it.
        config = self.flash_config(seq_tile_size=_tile(size), should_transpose_v=self.transposes)
        out, norms = self.flash_fwd[rows, heads](
            *(q, k, v if self.transposes else v.transpose(2, 3), None),
            logit_bias=bias,
            softmax_scale=width**-0.5,
            use_causal_mask=causal,
            mixed_precision=True,
            dropout_p=0.0,
            config=config,
        )
        return out, norms

    def backward(self, *given: Tensor, bias: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, grad, norms = given
        rows, heads, width, _ = q.shape
        dq, dk, dv = self.flash_attn_bwd[rows, heads](
            *(q, k, v, out, grad, norms, None),
            logit_bias_ref=bias,
            use_causal_mask=causal,
            mixed_precision=True,
            dropout_p=0.0,
            softmax_scale=width**-0.5,
        )
        return dq, dk, dv


def _tile(size: int) -> int:
    """Keys per tile of the forward pass: the kernel's default where the row is a multiple of it."""
    return next(tile for tile in (TILE, TILE // 2, BIASED_TILE) if size % tile == 0)


def nki_kernels(*, transposes: bool) -> BiasedKernels:
    """The compiler's. Raises EngineError where they are missing."""
    try:
        from neuronxcc.nki.kernels.attention import FlashConfig, flash_attn_bwd, flash_fwd
    except ImportError as error:
        raise _no_kernel(error) from error
    return NkiKernels(flash_fwd, flash_attn_bwd, FlashConfig, transposes)


class TracedKernels:
    """Kernels that compute nothing: they stand in recorded graphs, as ``traced_kernel`` does, with the bias
    as last operand and ``causal`` or ``full`` as configuration."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        rows, heads, width, size = q.shape
        out, norms = _custom_call(
            "nki_flash_fwd",
            [q, k, v, bias],
            [(rows, heads, size, width), (rows, heads, size)],
            [q.dtype, torch.float32],
            _extent(causal),
        )
        return out, norms

    def backward(self, *given: Tensor, bias: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, grad, norms = given
        dq, dk, dv = _custom_call(
            "nki_flash_bwd",
            [q, k, v, out, norms, grad, bias],
            [x.shape for x in (q, k, v)],
            [x.dtype for x in (q, k, v)],
            _extent(causal),
        )
        return dq, dk, dv


def _extent(causal: bool) -> str:
    return "causal" if causal else "full"


class IntervalFlashAttention:
    """Attention by any intervals of keys, by the kernel with a bias: 0 where a token sees a key, MASKED where
    not. It stands in place of the (N, S, S) scores in float32 that a dense mask costs per layer.

    Args:
        causal: whether no token sees a key behind it, so that half of the scores may be left out.
    """

    static_shapes = True

    def __init__(self, kernels: BiasedKernels, *, causal: bool) -> None:
        self._kernels, self._causal = kernels, causal

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> Tensor:
        """The bias of each row, (B, 1, S, S) bf16, which all heads and layers share.

        Raises UserError for rows of a length that the kernel does not take.
        """
        tokens = key_start.shape[1]
        if tokens % BIASED_TILE:
            raise UserError(
                f"model.fusions.flash_attention_packed: the flash kernel needs rows of a multiple of "
                f"{BIASED_TILE} tokens, but a row has {tokens}; set data.buckets to such multiples, or "
                "model.fusions.flash_attention_packed=False"
            )
        seen = visibility(key_start, key_stop)[:, None]
        # Not masked_fill, whose number would be float64 in the graph.
        return torch.where(seen, torch.zeros_like(seen, dtype=torch.bfloat16), MASKED)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, context: Tensor, softcap: float | None = None
    ) -> Tensor:
        """q (B, S, N, H), k and v (B, S, K, H) -> (B, S, N, H)."""
        assert softcap is None, "why_not_biased refuses models that cap"
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        # The kernel has one bias for all rows of a call.
        given = (*(x.permute(0, 2, 3, 1) for x in (q, k, v)), context.to(q.dtype))
        rows = zip(*(x.tensor_split(len(x)) for x in given), strict=True)
        found = [_IntervalFlash.apply(*row, self._kernels, self._causal) for row in rows]  # type: ignore[no-untyped-call]
        return torch.cat(found).transpose(1, 2)


class _IntervalFlash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernels: BiasedKernels, causal: bool
    ) -> Tensor:
        out, norms = kernels.forward(q, k, v, bias, causal=causal)
        ctx.save_for_backward(q, k, v, bias, out, norms)
        ctx.kernels, ctx.causal = kernels, causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, norms = ctx.saved_tensors
        out, grad = (x.transpose(2, 3) for x in (out, grad))
        found = ctx.kernels.backward(q, k, v, out, grad, norms, bias=bias, causal=ctx.causal)
        return *found, None, None, None
