"""The first or last tokens of a long text, without tokenizing all of it: truncation needs no others.

A tokenizer that splits a text into words before it merges letters makes the same tokens of the text and of
its pieces, if they are cut where a word surely ends. Other tokenizers (SentencePiece's, which merge over the
whole text) read a text whole, up to a limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nxdt_align.data.records import BadRecord, excerpt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BORDER = re.compile(r"[^\W\d_](?=[ \n.,;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")
"""A letter before a space, a line end or a punctuation mark. The patterns by which tokenizers split end a run
of letters there whatever stands further on, and look for nothing before it."""
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}
_PROBES = ("ab cd", "ab\n\ncd", "ab. cd", "ab, 12", "ab: x!", "what?\n")
_AROUND = 24
"""Characters on either side of a border that are split again, to see that it is one."""
_BYTES = 4
"""Tokens of a character, at most: its bytes in UTF-8."""
LONGEST = 200_000
"""Characters that are tokenized at once where nothing can be cut (or 64 per token of ``data.seq_length``):
well under a second."""


class LongTexts:
    """The tokens of long texts, as many of them as ``tokens`` from one end.

    Args:
        ids: text -> its tokens.
        tokens: the most that are needed of a text; ``data.seq_length``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ids: Callable[[str], list[int]], tokens: int
    ) -> None:
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._added = list(tokenizer.added_tokens_decoder.values())
        self._ids, self._tokens = ids, tokens
        self.piece = max(16 * tokens, 16_384)
        """Characters from which on a text is long."""
        self._longest = max(LONGEST, 64 * tokens)

    @cached_property
    def adds_prefix(self) -> bool:
        """Whether a text's first word may have other tokens than the same word within a text: SentencePiece
        writes a space in front of it. Told without tokenizing."""
        backend = self._backend
        if backend is None:
            return True
        return any(map(_is_prefix, (*_steps(backend.normalizer), *_steps(backend.pre_tokenizer))))

    @cached_property
    def splits(self) -> bool:
        """Whether a text's tokens are those of its pieces, cut at any ``_BORDER``."""
        if self._backend is None or self.adds_prefix or any(map(_hinders, self._added)):
            return False
        return (
            self._backend.pre_tokenizer is not None
            and getattr(self._backend.model, "dropout", None) is None
            and all(part["type"] in _LOCAL_NORMALIZERS for part in _steps(self._backend.normalizer))
            and all(self._is_split(p, m.end()) for p in _PROBES for m in _BORDER.finditer(p))
        )

    def first(self, text: str, more: int = 0) -> list[int]:
        """All tokens of ``text``, or at least ``tokens`` of its first ones behind ``more`` characters.

        Raises BadRecord where the text is too long and cannot be cut.
        """
        ids: list[int] = []
        begin = 0
        while begin < len(text) and (begin < more or len(ids) < self._tokens + _BYTES * more):
            end = self._border_after(text, begin)
            ids += self._ids(self._checked(text, begin, end))
            begin = end
        return ids

    def last(self, text: str) -> list[int]:
        """All tokens of ``text``, or at least ``tokens`` of its last ones. Raises BadRecord as ``first``."""
        parts: list[list[int]] = []
        end = len(text)
        while end and sum(map(len, parts)) < self._tokens:
            begin = self._border_before(text, end)
            parts.insert(0, self._ids(self._checked(text, begin, end)))
            end = begin
        return [token for part in parts for token in part]

    def last_border(self, text: str, within: int) -> int | None:
        """The last border in the last ``within`` characters; None without one, or if texts are not split."""
        if not self.splits:
            return None
        return self._last_border(text, max(len(text) - within, 0), len(text))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of the beginning of ``text`` begins and ends, in characters."""
        text = text[: self._border_after(text, 0)] if len(text) > self.piece else text
        # Byte-level BPE's takes white space off a token's ends, which are wanted as they are.
        processor, self._backend.post_processor = self._backend.post_processor, None
        try:
            found: list[tuple[int, int]] = self._backend.encode(text, add_special_tokens=False).offsets
        finally:
            self._backend.post_processor = processor
        return found

    def _checked(self, text: str, begin: int, end: int) -> str:
        if end - begin > self._longest:
            raise BadRecord(
                "too long",
                f"of a text of {len(text):,} characters, {end - begin:,} in a row cannot be tokenized in "
                f"parts; the limit is {self._longest:,}: {excerpt(text[begin : begin + 100])}; shorten it",
            )
        return text[begin:end]

    def _border_after(self, text: str, begin: int) -> int:
        """The end of the piece that begins there: its last border, or the first behind its length."""
        if not self.splits:
            return len(text)
        end = begin + self.piece
        if end >= len(text):
            return len(text)
        found = self._last_border(text, begin, end) or self._first_border(text, end - 1, len(text))
        return found or len(text)

    def _border_before(self, text: str, end: int) -> int:
        """The start of the piece that ends there."""
        if self.splits:
            for width in (self.piece, self._longest):
                if end <= width:
                    return 0
                found = self._first_border(text, end - width, end)
                if found is not None:
                    return found
        return 0

    def _first_border(self, text: str, begin: int, end: int) -> int | None:
        """The first border strictly between two places."""
        found = (match.end() for match in _BORDER.finditer(text, begin, end))
        return next((at for at in found if begin < at < end and self._is_split(text, at)), None)

    def _last_border(self, text: str, begin: int, end: int) -> int | None:
        found = [match.end() for match in _BORDER.finditer(text, begin, end)]
        return next((at for at in reversed(found) if begin < at < end and self._is_split(text, at)), None)

    def _is_split(self, text: str, at: int) -> bool:
        begin = max(at - _AROUND, 0)
        if not text[at - 1].isalpha():
            return False
        words = self._backend.pre_tokenizer.pre_tokenize_str(text[begin : at + _AROUND])
        return any(at - begin in places for _, places in words)


def _hinders(added: Any) -> bool:
    """Whether an added token spans a border, or takes the white space behind one."""
    text = str(added)
    return _BORDER.search(text) is not None or (added.rstrip and text[-1:].isalpha())


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a backend's normalizer or pre-tokenizer, as its tokenizer.json would have them."""

    def flat(state: dict[str, Any]) -> list[dict[str, Any]]:
        inner = state.get("normalizers", state.get("pretokenizers"))
        return [state] if inner is None else [step for each in inner for step in flat(each)]

    return [] if part is None else flat(json.loads(part.__getstate__()))


def _is_prefix(step: dict[str, Any]) -> bool:
    """Whether a step writes a space in front of a text."""
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return step["type"] == "Prepend" or bool(step.get("add_prefix_space"))
