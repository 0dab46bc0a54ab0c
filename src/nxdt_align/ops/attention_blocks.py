"""Attention by intervals for eager devices: a sequence at a time, no dense mask, no work between sequences.

Where blocks begin and end is read off the bounds on the host, so shapes follow the data. Legend as in
``attention.py``; ``L`` tokens of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nxdt_align.ops.attention import softcapped

MERGED_TOKENS = 64
"""Neighbouring sequences share one masked block up to this size: below it, calls cost more than sums."""
LONGEST_SLIDING = 512
"""Queries of a sliding window that share one product: each sees few of the keys of a longer stretch."""


@dataclass(frozen=True)
class _Alone:
    """Tokens that see themselves alone: padding, and prompts of one token."""

    length: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
        return v


@dataclass(frozen=True)
class _Part:
    """Queries of a block, the one stretch of keys that they see, and who sees which of them."""

    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None
    """(queries, keys) bool; None where each sees all, or is causal."""

    def capped(self, q: Tensor, k: Tensor, v: Tensor, softcap: float) -> Tensor:
        """(1, N, L, H) each, of these queries and keys: in plain products, as no kernel here caps scores."""
        scores = softcapped((q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5, softcap)
        mask = self.mask
        if self.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask.to(q.device), torch.finfo(torch.float32).min)
        return scores.softmax(-1).to(v.dtype) @ v


@dataclass(frozen=True)
class _Block:
    """Tokens that see no others, and that no others see."""

    length: int
    parts: tuple[_Part, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
        out = []
        for part in self.parts:
            given = q[:, :, part.queries], k[:, :, part.keys], v[:, :, part.keys]
            if softcap is None:
                out.append(scaled_dot_product_attention(*given, attn_mask=part.mask, is_causal=part.causal))
            else:
                out.append(part.capped(*given, softcap))
        return torch.cat(out, 2) if len(out) > 1 else out[0]


class BlockAttention:
    """Attention inside each sequence, or pair with a shared prompt, in blocks that the bounds give.

    ``prepare`` raises ValueError for a token that does not see itself.
    """

    static_shapes = False

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> Sequence[_Alone | _Block]:
        rows = zip(key_start.cpu(), key_stop.cpu(), strict=True)
        return [
            block for row, (start, stop) in enumerate(rows) for block in _blocks(start, stop, f"row {row}")
        ]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any, softcap: float | None = None) -> Tensor:
        blocks: Sequence[_Alone | _Block] = context
        # Values may be of another size than queries and keys.
        shape, groups = (*q.shape[:3], v.shape[-1]), q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        if all(isinstance(block, _Alone) for block in blocks):
            # Queries and keys count for nothing, but all ranks must have gradients for the same weights.
            return v + 0.0 * (q.sum() + k.sum())
        lengths = [block.length for block in blocks]
        # One split and one cat: the gradient of each slice by itself would be a whole row of zeros.
        rows = [x.reshape(1, -1, *x.shape[2:]).transpose(1, 2) for x in (q, k, v)]
        pieces = [torch.split(row, lengths, 2) for row in rows]
        out = [block(*parts, softcap) for block, *parts in zip(blocks, *pieces, strict=True)]
        return torch.cat([part.transpose(1, 2) for part in out], 1).view(shape)


def _blocks(start: Tensor, stop: Tensor, where: str) -> Iterator[_Alone | _Block]:
    """The blocks of one row, (S,), in order."""
    size = len(start)
    index = torch.arange(size, dtype=start.dtype)
    blind = ((start > index) | (stop <= index)).nonzero().flatten()
    if len(blind):
        s = int(blind[0])
        raise ValueError(f"{where}: token {s} sees the keys [{start[s]}, {stop[s]}), without itself")
    if not size:
        return
    # A block ends where no earlier token sees a later one, and no later one an earlier.
    seen_by_earlier = stop.cummax(0).values[:-1] > index[1:]
    sees_earlier = start.flip(0).cummin(0).values.flip(0)[1:] < index[1:]
    edges = [0, *((~(seen_by_earlier | sees_earlier)).nonzero().flatten() + 1).tolist(), size]
    single = [edges[i + 1] - edges[i] == 1 for i in range(len(edges) - 1)] + [False]
    first, count = 0, len(edges) - 1
    while first < count:
        last = first + 1
        if single[first] and single[first + 1]:
            while single[last]:
                last += 1
            yield _Alone(last - first)
        else:
            # Up to a stretch of tokens alone, as padding is, which needs no product.
            while (
                last < count
                and edges[last + 1] - edges[first] <= MERGED_TOKENS
                and not (single[last] and single[last + 1])
            ):
                last += 1
            begin, end = edges[first], edges[last]
            yield _block(start[begin:end] - begin, stop[begin:end] - begin, merged=last - first > 1)
        first = last


def _block(start: Tensor, stop: Tensor, *, merged: bool) -> _Block:
    """``merged``: of several sequences, which share a mask instead of a call each."""
    runs = [(0, len(start))] if merged else _runs(start, stop)
    return _Block(len(start), tuple(_part(start, stop, begin, end) for begin, end in runs))


def _part(start: Tensor, stop: Tensor, begin: int, end: int) -> _Part:
    lower, upper = start[begin:end, None], stop[begin:end, None]
    first, last = int(lower.min()), int(upper.max())
    queries, keys = slice(begin, end), slice(first, last)
    count = torch.arange(begin + 1, end + 1, dtype=stop.dtype)[:, None]
    if first == begin and bool((lower == begin).all() and (upper == count).all()):
        return _Part(queries, keys, causal=True, mask=None)
    if bool((lower == first).all() and (upper == last).all()):
        return _Part(queries, keys, causal=False, mask=None)
    index = torch.arange(first, last, dtype=start.dtype)
    return _Part(queries, keys, causal=False, mask=(index >= lower) & (index < upper))


_SLIDING, _OTHER = 3, -1


def _runs(start: Tensor, stop: Tensor) -> list[tuple[int, int]]:
    """Stretches of tokens whose bounds move alike from each to the next.

    A stop that moves is a sequence in reading order; a start that moves, a reversed response; both, a window
    that slides.
    """
    of_start, of_stop = start.diff(), stop.diff()
    is_step = (of_start >= 0) & (of_start <= 1) & (of_stop >= 0) & (of_stop <= 1)
    moves = torch.where(is_step, of_start * 2 + of_stop, _OTHER)
    runs: list[tuple[int, int]] = []
    begin, size = 0, len(start)
    while begin < size:
        move = int(moves[begin]) if begin < size - 1 else _OTHER
        end = begin + 1
        if move != _OTHER:
            others = (moves[begin:] != move).nonzero()
            end = begin + int(others[0]) + 1 if len(others) else size
        if move == _SLIDING:
            end = min(end, begin + LONGEST_SLIDING)
        runs.append((begin, end))
        begin = end
    return runs
