"""Rows of texts that grow by a token at a time, with a key-value cache, for a model whose layers are all in
this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nxdt_align.batch import Batch
from nxdt_align.engines.greedy import RowsOf, Texts, last_tokens, rows_to_continue
from nxdt_align.engines.scoring import Scorer
from nxdt_align.ops.attention_cache import CachedAttention


@contextmanager
def cached_rows(scorer: Scorer, length: int) -> Iterator[RowsOf]:
    """A function from texts to what ``scorer`` is to be given of them meanwhile, in this order: the texts,
    then those with one more token each, or for a text that has ended the same again.

    ``length``: that no text exceeds.
    """
    attention = scorer.attention
    cache = CachedAttention(attention, length)
    is_first = True

    def rows(texts: Texts) -> Batch:
        nonlocal is_first
        if is_first:
            is_first = False
            cache.begin()
            # One shape for all prompts of a run where the attention may be compiled for each.
            return rows_to_continue(texts, length if attention.static_shapes else max(map(len, texts)))
        cache.begin([len(text) - 1 for text in texts])
        return last_tokens(texts)

    with scorer.attending(cache):
        yield rows
