"""Tokens that continue prompts, one at a time, and the rows that a model is given of them: whole texts in one
shape, which every engine and every layout of its ranks can do, or the last token of each, behind a key-value
cache.

Legend: ``B`` prompts, ``S`` tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from nxdt_align.batch import Batch, SlotRole

Texts = Sequence[Sequence[int]]
RowsOf = Callable[[Texts], Batch]
"""Of texts, the rows whose one response position is where each text's next token is predicted."""


def continue_prompts(
    prompts: Texts, *, max_tokens: int, ends: Collection[int], next_tokens: Callable[[Texts], list[int]]
) -> list[list[int]]:
    """The tokens behind each prompt, up to one of ``ends``, which is included.

    Args:
        next_tokens: of texts: the token behind each. Called with the prompts, then each time with a token
            more behind those that have not ended.
    """
    texts = [list(prompt) for prompt in prompts]
    running = set(range(len(texts)))
    for _ in range(max_tokens):
        for row, token in enumerate(next_tokens(texts)):
            if row in running:
                texts[row].append(token)
                if token in ends:
                    running.remove(row)
        if not running:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def rows_to_continue(texts: Texts, length: int) -> Batch:
    """A row per text, (B, S), S being ``length``, as layout ``none`` lays it."""
    sizes = torch.tensor([len(text) for text in texts])
    places = torch.arange(length).expand(len(texts), length)
    is_text = places < sizes[:, None]
    return _rows(
        torch.tensor([[*text, *[text[0]] * (length - len(text))] for text in texts]),
        position_ids=torch.where(is_text, places, 0),
        key_start=torch.where(is_text, 0, places).int(),
        key_stop=(places + 1).int(),
        last=sizes[:, None] - 1,
    )


def last_tokens(texts: Texts) -> Batch:
    """A row per text, (B, 1), with its last token, whose bounds count from itself: see CachedAttention."""
    places = torch.tensor([[len(text) - 1] for text in texts])
    return _rows(
        torch.tensor([[text[-1]] for text in texts]),
        position_ids=places,
        key_start=-places.int(),
        key_stop=torch.ones_like(places).int(),
        last=torch.zeros_like(places),
    )


def _rows(ids: Tensor, *, position_ids: Tensor, key_start: Tensor, key_stop: Tensor, last: Tensor) -> Batch:
    """With one response position, ``last``, (B, 1), whose label is any token."""
    count = len(ids)
    return Batch(
        input_ids=ids,
        position_ids=position_ids,
        key_start=key_start,
        key_stop=key_stop,
        response_positions=last,
        labels=ids[:, :1].clone(),
        slot_index=torch.zeros(count, 1, dtype=torch.int64),
        slot_valid=torch.ones(count, 1, dtype=torch.bool),
        slot_role=torch.full((count, 1), int(SlotRole.SINGLE)),
        desirable=torch.ones(count, 1, dtype=torch.bool),
        record_index=torch.arange(count)[:, None],
        global_pairs=torch.tensor(float(count)),
        global_tokens=torch.tensor(float(count)),
    )
