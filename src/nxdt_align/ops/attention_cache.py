"""Attention of texts that grow by a token at a time, with the keys and values of all earlier tokens kept.

Legend as in ``attention.py``; ``L`` places that a row has for tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nxdt_align.ops.attention import Attention, masked_attention


class _Later(NamedTuple):
    """The context of a pass over one token per row."""

    mask: Tensor
    """(B, 1, 1, keys) bool: the places that each row's token sees."""
    places: Tensor
    """(B,) int64: where it stands itself."""


class CachedAttention:
    """The first pass is over texts from their first token on, each later one over one more token per row.

    In a later pass the bounds of ``prepare`` count from the row's token: what came before it is negative, so
    that a token with p tokens before it sees [-p, 1). A sliding window's bounds are made of that, too.
    The layers of a model are told apart by the order of their calls, which is the same in each pass. Without
    gradients: what is kept is overwritten.

    Args:
        attention: of the first pass.
        size: L.
    """

    static_shapes = True
    """Not to leave out padding: a token's place in its row is its place here."""

    def __init__(self, attention: Attention, size: int) -> None:
        self._attention, self._size = attention, size
        self._kept: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each call of a pass, (B, K, L, H) each."""
        self._places: Sequence[int] | None = None
        self._calls = 0

    def begin(self, places: Sequence[int] | None = None) -> None:
        """Before each pass. ``places``: of the rows' tokens in their texts; None where rows are whole texts,
        which also forgets what is kept."""
        if places is None:
            self._kept = []
        self._places, self._calls = places, 0

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> Any:
        if self._places is None:
            return self._attention.prepare(key_start, key_stop)
        device = key_start.device
        places = torch.tensor(self._places, device=device)
        start, stop = (bound + places[:, None] for bound in (key_start, key_stop))
        index = torch.arange(max(self._places) + 1, device=device)
        return _Later(((index >= start) & (index < stop))[:, None, None], places)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any, softcap: float | None = None) -> Tensor:
        if self._places is None:
            self._kept.append((self._with_room(k), self._with_room(v)))
            return self._attention(q, k, v, context, softcap)
        keys, values = self._kept[self._calls]
        self._calls += 1
        mask, places = context
        rows = torch.arange(len(places), device=places.device)
        keys[rows, :, places], values[rows, :, places] = k[:, 0], v[:, 0]
        k, v = (kept[:, :, : mask.shape[-1]].transpose(1, 2) for kept in (keys, values))
        return masked_attention(q, k, v, mask, softcap)

    def _with_room(self, x: Tensor) -> Tensor:
        """(B, S, K, H) -> (B, K, L, H). Zeros, as what no token sees is a factor of weights that are 0."""
        room = x.new_zeros(x.shape[0], x.shape[2], self._size, x.shape[3])
        room[:, :, : x.shape[1]] = x.transpose(1, 2)
        return room
