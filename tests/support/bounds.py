"""Rows written as what stands in them, and the bounds that they have by the definition of a layout."""

from __future__ import annotations

import torch
from torch import Tensor

Item = tuple[int, ...]
"""(n,): a sequence of n tokens; (first, context, second): a pair around its prompt; (-n,): n of padding."""


def key_bounds(rows: list[list[Item]], window: int | None = None) -> tuple[Tensor, Tensor]:
    """(B, S) int32 each: the first and one past the last key of every token."""
    starts, stops = [], []
    for row in rows:
        start: list[int] = []
        stop: list[int] = []
        for item in row:
            at = len(start)
            if len(item) == 3:
                first, context, second = item
                prompt, end = at + first, at + first + context
                start += [*range(at, prompt), *[prompt] * (context + second)]
                stop += [*[end] * first, *range(prompt + 1, end + second + 1)]
            elif item[0] < 0:
                start += range(at, at - item[0])
                stop += range(at + 1, at + 1 - item[0])
            else:
                start += [at] * item[0]
                stop += range(at + 1, at + 1 + item[0])
        if window is not None:
            start = [max(s, i + 1 - window) for i, s in enumerate(start)]
        starts.append(start)
        stops.append(stop)
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(stops, dtype=torch.int32)
