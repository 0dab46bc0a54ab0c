"""The tokens that mark where a text begins and ends, written in the data's own text: each counts once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTexts:
    """How the tokenizer's BOS, EOS and padding are written; None where it has none, or reads that text as
    ordinary words."""

    bos: str | None
    eos: str | None
    pad: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTexts:
        # An added token is one token wherever its text stands, unless such texts are asked to be split.
        added = {} if tokenizer.split_special_tokens else tokenizer.added_tokens_decoder

        def written(number: int | None) -> str | None:
            token = None if number is None else added.get(number)
            return str(token) if token is not None and str(token) else None

        return cls(
            bos=written(tokenizer.bos_token_id),
            eos=written(tokenizer.eos_token_id),
            pad=written(tokenizer.pad_token_id),
        )

    def occur_in(self, text: str) -> bool:
        """Whether the text has BOS or EOS anywhere: others are as they should be."""
        return (self.bos is not None and self.bos in text) or (self.eos is not None and self.eos in text)

    def prompt(self, text: str) -> str:
        """``text`` with one BOS where it begins with several, or with white space before one."""
        begins = self._after_bos(text)
        return f"{self.bos}{text[begins:]}" if begins else text

    def response(self, text: str) -> str:
        """``text`` without a BOS at its start, and where it ends with EOS, with one and nothing behind it."""
        text = self.without_bos(text)
        end = ends_at(text, [t for t in (self.eos, self.pad, self.bos) if t], must_have=[self.eos])
        return text if end is None or text[end:] == self.eos else f"{text[:end]}{self.eos}"

    def without_bos(self, text: str) -> str:
        begins = self._after_bos(text)
        return text[begins:] if begins else text

    def _after_bos(self, text: str) -> int:
        """Where the text goes on behind the BOS tokens that it begins with; 0 if it begins with none."""
        after = place = 0
        while self.bos is not None:
            while place < len(text) and text[place].isspace():
                place += 1
            if not text.startswith(self.bos, place):
                break
            after = place = place + len(self.bos)
        return after


def ends_at(text: str, tokens: Collection[str], must_have: Collection[str | None]) -> int | None:
    """Where the run of ``tokens``, and of white space between and behind them, begins that ``text`` ends
    with: at its first token. None if there is no such run with one of ``must_have`` in it."""
    begins, found = len(text), False
    while True:
        end = begins
        while end and text[end - 1].isspace():
            end -= 1
        token = next((t for t in tokens if text.endswith(t, 0, end)), None)
        if token is None:
            return begins if found else None
        begins, found = end - len(token), found or token in must_have
