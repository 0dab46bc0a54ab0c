"""Tokens that continue prompts, by whole forward passes over rows of one shape: what every engine and every
layout of its ranks can do, without a key-value cache.

Legend: ``B`` prompts, ``S`` tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from nxdt_align.batch import Batch, SlotRole


def continue_prompts(
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    max_tokens: int,
    ends: Collection[int],
    next_tokens: Callable[[Batch], list[int]],
) -> list[list[int]]:
    """The tokens behind each prompt, up to one of ``ends``, which is included.

    Args:
        length: S, at least that of the longest prompt and ``max_tokens``.
        next_tokens: of rows whose last token is where the one response position is: the token of each.
    """
    assert max(map(len, prompts)) + max_tokens <= length
    texts = [list(prompt) for prompt in prompts]
    running = set(range(len(texts)))
    for _ in range(max_tokens):
        for row, token in enumerate(next_tokens(rows_to_continue(texts, length))):
            if row in running:
                texts[row].append(token)
                if token in ends:
                    running.remove(row)
        if not running:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def rows_to_continue(texts: Sequence[Sequence[int]], length: int) -> Batch:
    """A row per text, (B, S), as layout ``none`` lays it, with one response position: its last token, whose
    label is any token."""
    count = len(texts)
    sizes = torch.tensor([len(text) for text in texts])
    places = torch.arange(length).expand(count, length)
    is_text = places < sizes[:, None]
    ids = torch.tensor([[*text, *[text[0]] * (length - len(text))] for text in texts])
    one = torch.zeros(count, 1, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        position_ids=torch.where(is_text, places, 0),
        key_start=torch.where(is_text, 0, places).int(),
        key_stop=(places + 1).int(),
        response_positions=sizes[:, None] - 1,
        labels=ids[:, :1].clone(),
        slot_index=one,
        slot_valid=torch.ones(count, 1, dtype=torch.bool),
        slot_role=torch.full((count, 1), int(SlotRole.SINGLE)),
        desirable=torch.ones(count, 1, dtype=torch.bool),
        record_index=torch.arange(count)[:, None],
        global_pairs=torch.tensor(float(count)),
        global_tokens=torch.tensor(float(count)),
    )
