"""Attention by one interval of keys per query, and the two backends that run on any device.

Token s sees the keys [key_start[s], key_stop[s]) of its row and no others: every layout of ``data.collate``
is written so that this one pair of vectors says all. The model calls ``attend(q, k, v, context)``; what
``context`` is belongs to the backend, prepared once per batch. Scores are scaled by 1 / sqrt(H); a model with
another scale has it in its queries. Some models cap them: cap * tanh(score / cap). Legend: ``B`` rows, ``S``
tokens, ``N`` query heads, ``K`` key-value heads, ``H`` head size, ``G`` query heads per key-value head.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nxdt_align.errors import UserError


class Attention(Protocol):
    """One way to compute attention by intervals."""

    @property
    def static_shapes(self) -> bool:
        """Whether rows must keep their shapes; else the caller may leave out padding."""
        ...

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> Any:
        """The context of rows with these bounds, (B, S) int32 each."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any, softcap: float | None = None) -> Tensor:
        """q (B, S, N, H), k and v (B, S, K, H) -> (B, S, N, H); values of another size than queries and keys
        give results of that size. Raises UserError for a cap that it cannot compute."""
        ...


def pad_bounds(key_start: Tensor, key_stop: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """The bounds, (B, S) each, of rows with ``extra`` more tokens of padding, which see themselves alone."""
    size = key_start.shape[1]
    alone = torch.arange(size, size + extra, dtype=key_start.dtype, device=key_start.device)
    alone = alone.expand(key_start.shape[0], -1)
    return torch.cat((key_start, alone), 1), torch.cat((key_stop, alone + 1), 1)


def visibility(key_start: Tensor, key_stop: Tensor) -> Tensor:
    """Which token sees which: (B, S, S) bool, [b, s, j] true where token s attends to token j.

    Two comparisons of 32-bit integers: Trainium has no fast 64-bit arithmetic, floor division or remainder.
    """
    index = torch.arange(key_start.shape[1], dtype=key_start.dtype, device=key_start.device)
    return (index >= key_start[:, :, None]) & (index < key_stop[:, :, None])


FUSED_DEVICES = ("cpu", "cuda")
"""Types of devices with a kernel that takes a mask. Elsewhere PyTorch takes it apart, into products in
float32 whatever the inputs are (_scaled_dot_product_attention_math)."""


class DenseAttention:
    """A mask made of the bounds, (B, 1, S, S): static shapes, every device and every layout."""

    static_shapes = True

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> Tensor:
        return visibility(key_start, key_stop)[:, None]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, context: Tensor, softcap: float | None = None
    ) -> Tensor:
        if softcap is not None or q.device.type not in FUSED_DEVICES:
            return masked_attention(q, k, v, context, softcap)
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=context).transpose(1, 2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None = None) -> Tensor:
    """Attention in plain products of the inputs' dtype, with the softmax in float32 between them.

    q (B, S, N, H), k and v (B, S, K, H), mask (B, 1, S, S) bool -> (B, S, N, H) in q's dtype. Heads that
    share a key-value head are rows of one product with it: keys and values are not copied for each of them.
    """
    rows, size, heads, width = q.shape
    kv_heads = k.shape[2]
    by_key = (rows, kv_heads, heads // kv_heads, size, -1)  # (B, K, G, S, ...)
    q = q.view(rows, size, kv_heads, -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    scores = (q @ k.transpose(2, 3)).view(by_key).float() * width**-0.5
    if softcap is not None:
        scores = softcapped(scores, softcap)
    # Not -inf: NaN times 0 in the backward pass of a compiler that multiplies instead of choosing.
    scores = torch.where(mask[:, :, None], scores, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(v.dtype)
    out: Tensor = (weights.flatten(2, 3) @ v).view(by_key)
    return out.permute(0, 3, 1, 2, 4).reshape(rows, size, heads, -1)


def softcapped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): between -cap and cap."""
    return torch.tanh(x / cap) * cap


class CausalAttention:
    """Every token sees the earlier ones of its row, by the device's flash kernel, which takes no mask.

    Right in layout none alone: a row holds one sequence there and padding comes last, which sees what stands
    before it, and which no token sees.

    Args:
        multiple: of tokens, that rows have to be for the device's kernel.
        instead: the setting that takes rows of other lengths, for the message.
    """

    static_shapes = True

    def __init__(self, multiple: int = 1, instead: str = "data.attention=dense") -> None:
        self._multiple, self._instead = multiple, instead

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> None:
        """Nothing. Raises UserError for rows of a length that the kernel does not take."""
        tokens = key_start.shape[1]
        if tokens % self._multiple:
            raise UserError(
                f"the flash kernel needs rows of a multiple of {self._multiple} tokens, but a row has "
                f"{tokens}; set data.seq_length to such a multiple, or {self._instead}"
            )

    def refuse_softcap(self, softcap: float | None) -> None:
        """Raises UserError for a model that caps its scores, which the kernel does not."""
        if softcap is not None:
            raise UserError(
                f"the flash kernel does not cap scores, as this model does (at {softcap:g}); set "
                f"{self._instead}"
            )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, context: None, softcap: float | None = None
    ) -> Tensor:
        self.refuse_softcap(softcap)
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
