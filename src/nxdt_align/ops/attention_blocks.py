"""Attention over packed rows, an example at a time: no dense mask, no work between examples.

For eager devices: where blocks begin and end is read on the host, so shapes follow the data.
Legend as in ``attention.py``; ``L`` tokens of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nxdt_align.batch import PADDING_SEGMENT, SEGMENT_STRIDE
from nxdt_align.ops.attention import visibility

MERGED_TOKENS = 64
"""Neighbouring examples share one masked block up to this size: below it, calls cost more than sums."""


@dataclass(frozen=True)
class _Run:
    """Neighbouring tokens of one segment, counted over all rows."""

    start: int
    length: int
    segment: int

    @property
    def example(self) -> int:
        return self.segment // SEGMENT_STRIDE


@dataclass(frozen=True)
class _Padding:
    """Tokens that see themselves alone."""

    length: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v


@dataclass(frozen=True)
class _Masked:
    """Several small examples behind one mask, (L, L) bool."""

    length: int
    mask: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


@dataclass(frozen=True)
class _Single:
    """One example: prompt and first response are causal; each later response sees prompt and itself."""

    length: int
    prompt: int
    responses: tuple[int, ...]
    masks: tuple[Tensor, ...]
    """For each response after the first, (n, prompt + n) bool."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.prompt + (self.responses[0] if self.responses else 0)
        first = slice(end)
        parts = [scaled_dot_product_attention(q[:, :, first], k[:, :, first], v[:, :, first], is_causal=True)]
        for length, mask in zip(self.responses[1:], self.masks, strict=True):
            own = slice(end, end + length)
            keys = torch.cat((k[:, :, : self.prompt], k[:, :, own]), 2)
            values = torch.cat((v[:, :, : self.prompt], v[:, :, own]), 2)
            parts.append(scaled_dot_product_attention(q[:, :, own], keys, values, attn_mask=mask))
            end += length
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


_Block = _Padding | _Masked | _Single


class BlockAttention:
    """Causal attention inside each example, in blocks found from the segment ids on the host.

    ``prepare`` raises ValueError where an example's tokens do not stand together, prompt first.
    """

    static_shapes = False

    def prepare(self, segment_ids: Tensor) -> Sequence[_Block]:
        return [block for row, ids in enumerate(segment_ids.cpu()) for block in _blocks(ids, f"row {row}")]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        blocks: Sequence[_Block] = context
        shape, groups = q.shape, q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        if all(isinstance(block, _Padding) for block in blocks):
            # Queries and keys count for nothing, but all ranks must have gradients for the same weights.
            return v + 0.0 * (q.sum() + k.sum())
        lengths = [block.length for block in blocks]
        # One split and one cat: the gradient of each slice by itself would be a whole row of zeros.
        rows = [x.reshape(1, -1, *x.shape[2:]).transpose(1, 2) for x in (q, k, v)]
        pieces = [torch.split(row, lengths, 2) for row in rows]
        out = [block(*parts) for block, *parts in zip(blocks, *pieces, strict=True)]
        return torch.cat([part.transpose(1, 2) for part in out], 1).view(shape)


def _blocks(segment_ids: Tensor, where: str) -> Iterator[_Block]:
    """The blocks of one row, (S,), in order."""
    waiting: list[list[_Run]] = []
    for runs in _examples(segment_ids, where):
        size = _size(runs)
        if waiting and sum(map(_size, waiting)) + size > MERGED_TOKENS:
            yield _joined(waiting, segment_ids)
            waiting = []
        if runs[0].segment == PADDING_SEGMENT:
            if waiting:
                yield _joined(waiting, segment_ids)
                waiting = []
            yield _Padding(size)
        else:
            waiting.append(runs)
    if waiting:
        yield _joined(waiting, segment_ids)


def _joined(examples: list[list[_Run]], segment_ids: Tensor) -> _Block:
    size = sum(map(_size, examples))
    if len(examples) > 1:
        start = examples[0][0].start
        return _Masked(size, visibility(segment_ids[None, start : start + size])[0])
    (runs,) = examples
    has_prompt = runs[0].segment % SEGMENT_STRIDE == 0
    prompt = runs[0].length if has_prompt else 0
    responses = tuple(run.length for run in runs[has_prompt:])
    masks = tuple(torch.ones(n, prompt + n, dtype=torch.bool).tril(prompt) for n in responses[1:])
    return _Single(size, prompt, responses, masks)


def _examples(segment_ids: Tensor, where: str) -> Iterator[list[_Run]]:
    """Runs by example; a stretch of padding counts as one."""
    values, counts = (x.tolist() for x in torch.unique_consecutive(segment_ids, return_counts=True))
    seen: set[int] = set()
    group: list[_Run] = []
    start = 0
    for segment, length in zip(values, counts, strict=True):
        if segment != PADDING_SEGMENT and segment in seen:
            raise ValueError(f"{where}: the tokens of segment {segment} do not stand together")
        run = _Run(start, length, segment)
        is_prompt = segment % SEGMENT_STRIDE == 0
        if group and run.example == group[-1].example and is_prompt:
            raise ValueError(f"{where}: the prompt of segment {segment} stands after its responses")
        if group and run.example != group[-1].example:
            yield group
            group = []
        if not group and segment != PADDING_SEGMENT and any(s // SEGMENT_STRIDE == run.example for s in seen):
            raise ValueError(f"{where}: the segments of example {run.example} do not stand together")
        group.append(run)
        seen.add(segment)
        start += length
    if group:
        yield group


def _size(runs: Sequence[_Run]) -> int:
    return sum(run.length for run in runs)
