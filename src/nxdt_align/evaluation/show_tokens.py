"""A record as its tokens: prompt, responses and what truncation cuts, in colours on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nxdt_align.data.records import Record
from nxdt_align.data.tokenize import Encoded, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLOURS = {"prompt": "34", "chosen": "32", "rejected": "31", "response": "32", "cut": "9;90"}
"""ANSI codes; cut: struck through, grey."""


def show(
    record: Record,
    kept: Encoded,
    whole: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    *,
    colours: bool,
) -> str:
    """Lines of a record, its tokens parted by |. ``whole``: its tokens without truncation."""
    names = ("chosen", "rejected") if len(kept.responses) == 2 else ("response",)
    cut = len(whole.prompt) - len(kept.prompt)
    # BOS is kept; what is cut stands after it.
    has_bos = cut > 0 and kept.prompt[:1] == whole.prompt[:1] == [tokenizer.bos_token_id]
    begin = 1 if has_bos else 0
    parts = [
        ("prompt", whole.prompt[:begin]),
        ("cut", whole.prompt[begin : begin + cut]),
        ("prompt", whole.prompt[begin + cut :]),
    ]
    lines = [record.source, f"  prompt ({len(kept.prompt)}): " + _painted(parts, tokenizer, colours)]
    for name, own, all_of in zip(names, kept.responses, whole.responses, strict=True):
        parts = [(name, own), ("cut", all_of[len(own) :])]
        lines.append(f"  {name} ({len(own)}): " + _painted(parts, tokenizer, colours))
    return "\n".join(lines)


def _painted(parts: Sequence[tuple[str, Tokens]], tokenizer: PreTrainedTokenizerBase, colours: bool) -> str:
    found = []
    for name, ids in parts:
        if not ids:
            continue
        # Escaped: a text may hold codes that a terminal obeys.
        texts = [_visible(str(tokenizer.decode([token]))) for token in ids]
        text = "|".join(texts)
        if colours:
            text = f"\x1b[{_COLOURS[name]}m{text}\x1b[0m"
        elif name == "cut":
            text = f"[cut: {text}]"
        found.append(text)
    return "|".join(found)


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
