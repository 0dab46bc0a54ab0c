"""Records to tokens: one BOS and EOS, identical prompt tokens for every response, then truncation.

Chat messages go through the tokenizer's chat template, and a conversation has the tokens that its whole text
has. Of text, prompt and response are tokenized separately, so no token spans their border, except where white
space is at it and the tokenizer would add a space of its own (SentencePiece): then as a conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nxdt_align.data.chat import TEMPLATE_DATE, ChatTemplate
from nxdt_align.data.record_texts import RecordTexts, Rendered, Texts
from nxdt_align.data.records import (
    BadRecord,
    DataError,
    Record,
    Response,
    content_of,
    excerpt,
    further_keys,
)
from nxdt_align.data.text_tokens import Parts, TextTokens
from nxdt_align.data.text_tokens import Tokens as Tokens  # a part of this file's types
from nxdt_align.data.tokenizer import tokenizer_content
from nxdt_align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES_VERSION = 2
"""Increment it when a change gives some records different tokens. 2: a special token that the data write
counts once; conversations are tokenized whole. A record whose tokens this changed is known under another id,
and token caches that may hold such records under another name, so that nothing older is used for them."""
_FIRST_RULES = 1
"""The version in the fingerprint, under which records with unchanged tokens keep what is stored."""
TruncationMode = Literal["keep_start", "keep_end"]


class Encoded(NamedTuple):
    """The tokens of one record."""

    prompt: Tokens
    responses: list[Tokens]
    truncated: bool
    """Whether truncation cut any of them."""
    unread: tuple[str, ...] = ()
    """Keys of its messages with which its tokens do not change."""
    changed: bool = False
    """Whether an earlier version of the rules gave it other tokens."""
    whole: tuple[int, ...] = ()
    """Tokens of the prompt and of each response before truncation; of a very long text at least
    ``seq_length`` of them."""
    as_before: bool = False
    """What ``Tokenization.as_before`` says."""


@dataclass(frozen=True)
class Example:
    """A tokenized record. The arrays are views of the whole set's arrays; do not write to them."""

    record_id: str
    """The content hash of its record, hex; another for one whose tokens later rules changed."""
    prompt: npt.NDArray[Any]
    """(P,) int32, P >= 1, BOS included."""
    responses: tuple[npt.NDArray[Any], ...]
    """(chosen, rejected) for a pair, (response,) otherwise; each (n,) int32, n >= 1, EOS (or the chat
    template's end of turn) included unless truncation cut it."""
    desirable: bool = True


@dataclass(frozen=True)
class Truncation:
    """Limits on the tokens of a prompt, and of a prompt with one response.

    1. A prompt over ``max_prompt_length`` keeps BOS and its last tokens.
    2. If the prompt and the longest response still exceed ``seq_length``: ``keep_start`` cuts the end
       of each response that is too long; ``keep_end`` first cuts the prompt after BOS, by what the
       longest response needs, and cuts the ends of responses only when one prompt token is left
       (BOS, or the last token if there is no BOS): something must predict the first response
       token.

    A response keeps at least one token. A truncated response has no EOS, as it does not end there.
    """

    seq_length: int
    max_prompt_length: int | None = None
    """None: ``seq_length - 1``."""
    mode: TruncationMode = "keep_start"

    def __post_init__(self) -> None:
        if self.seq_length < 2:
            raise UserError(
                "data.seq_length must be at least 2 (one prompt and one response token), "
                f"but is {self.seq_length}"
            )
        if self.mode not in ("keep_start", "keep_end"):
            raise UserError(f"truncation_mode must be keep_start or keep_end, but is {self.mode!r}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.seq_length:
            raise UserError(
                f"max_prompt_length must be at least 1 and below data.seq_length ({self.seq_length}), "
                f"so that a response token fits after the prompt, but is {self.max_prompt_length}"
            )

    @property
    def prompt_limit(self) -> int:
        return self.max_prompt_length or self.seq_length - 1

    @property
    def cuts_of_sequences(self) -> str:
        """What ``seq_length`` cuts, in words."""
        return "the responses" if self.mode == "keep_start" else "the prompts, or the responses,"

    def __call__(
        self, prompt: Tokens, responses: Sequence[Tokens], bos: int | None
    ) -> tuple[Tokens, list[Tokens], bool]:
        """The prompt and its responses after truncation, and whether anything was cut."""
        longest = max(map(len, responses))
        prompt_room = self.prompt_limit
        if self.mode == "keep_end":
            prompt_room = min(prompt_room, max(self.seq_length - longest, 1))
        kept = keep_last(prompt, prompt_room, bos)
        room = self.seq_length - len(kept)
        cut = len(kept) < len(prompt) or longest > room
        return kept, [response[:room] for response in responses], cut


def keep_last(prompt: Tokens, room: int, bos: int | None) -> Tokens:
    """The last ``room`` tokens, including BOS if the prompt begins with it."""
    if len(prompt) <= room:
        return prompt
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


class Tokenization:
    """``record -> Example``: a tokenizer, its chat template and a truncation.

    The prompt starts with one BOS if the tokenizer has one, a response ends with one EOS and nothing behind
    it, and begins with no BOS, whatever the text or the chat template writes. A chat response ends with its
    template's end-of-turn token, without the white space that the template writes after it (generation stops
    there), and gets EOS only if the template writes no such token.

    A conversation has the tokens of its whole text. Its prompt are those that lie wholly before the response
    and that all responses have in common; one that straddles the border is the response's.

    ``template_variables``: of the chat template, such as ``{"enable_thinking": False}``.

    Raises UserError if the tokenizer has no EOS, or its chat template does not read one of these variables.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        truncation: Truncation,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, so a model could not learn where a response ends; "
                "set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.truncation = truncation
        self._chat = ChatTemplate(tokenizer, template_variables)
        self._texts = RecordTexts(tokenizer, self._chat)
        self._tokens = TextTokens(tokenizer, self._chat, truncation.seq_length)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int = tokenizer.eos_token_id

    def __call__(self, record: Record) -> Example:
        """Raises DataError where a chat record meets no template, or one that refuses it, or a prompt gives
        no token."""
        encoded = self.encode([record])[0]
        if isinstance(encoded, BadRecord):
            raise DataError(f"{record.source}: {encoded.detail}") from encoded
        record_id = changed_id(record.id) if encoded.changed else record.id
        return Example(record_id, _array(encoded.prompt), tuple(map(_array, encoded.responses)))

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """The tokens of each record, or why it has none. Raises DataError where a chat record meets no
        template, or one that does not come to an end."""
        rendered = self._texts.render(records)
        asking = [
            r if isinstance(r, BadRecord) else self._tokens.of(r, is_chat=not isinstance(record.prompt, str))
            for record, r in zip(records, rendered, strict=True)
        ]
        found = self._tokens.answered(asking)
        return [
            each if isinstance(each, BadRecord) else self._finish(record, *each, texts)
            for record, each, texts in zip(records, found, rendered, strict=True)
        ]

    def prompts(self, records: Sequence[Record]) -> list[Tokens | BadRecord]:
        """The tokens of each prompt, to be answered: whole, with BOS if there is one. Responses are not read.

        Raises DataError where a chat prompt meets no template, or one that does not come to an end.
        """
        rendered = self._texts.render([replace(record, responses=()) for record in records])
        texts = [each.texts.prompt for each in rendered if isinstance(each, Rendered)]
        ids = iter(self._tokens.ids(texts))
        return [each if isinstance(each, BadRecord) else self._opened(next(ids)) for each in rendered]

    def turn_end(self) -> int | None:
        """The token that ends an assistant's turn in the chat template; None where it writes none."""
        return self._chat.turn_end[0]

    def _opened(self, prompt: Tokens) -> Tokens:
        return prompt if self._bos is None or prompt[:1] == [self._bos] else [self._bos, *prompt]

    def as_before(self, record: Record) -> bool:
        """Whether all versions of the rules surely give the record the same tokens, without tokenizing it."""
        if not isinstance(record.prompt, str):
            return False
        texts = Texts(record.prompt, [content_of(response) for response in record.responses])
        return not self._tokens.are_joined(texts) and self._texts.once(texts) == texts

    def _finish(self, record: Record, now: Parts, before: Parts, rendered: Any) -> Encoded | BadRecord:
        prompt, responses, cut, whole = self._closed(record, now)
        if not prompt:
            found = f"the tokenizer makes no token of the prompt {excerpt(record.prompt)}"
            return BadRecord("prompt without tokens", found)
        changed = before is not now and self._closed(record, before)[:2] != (prompt, responses)
        is_text = isinstance(record.prompt, str)
        as_before = is_text and rendered.before is None and not self._tokens.are_joined(rendered.texts)
        return Encoded(prompt, responses, cut, rendered.unread, changed, whole, as_before)

    def _closed(self, record: Record, parts: Parts) -> tuple[Tokens, list[Tokens], bool, tuple[int, ...]]:
        """Prompt and responses with BOS and EOS, truncated; whether anything was cut; the lengths before. The
        prompt may be empty."""
        prompt = self._opened(parts.prompt)
        closed = [self._close(*each, record) for each in zip(parts.responses, record.responses, strict=True)]
        lengths = (len(prompt), *map(len, closed))
        if not prompt:
            return prompt, closed, False, lengths
        return *self.truncation(prompt, closed, self._bos), lengths

    def _close(self, ids: Tokens, response: Response, record: Record) -> Tokens:
        if not isinstance(record.prompt, str):
            end, behind = self._chat.turn_end
            if end is not None and ids[-len(behind) - 1 :] == [end, *behind]:
                return ids[: len(ids) - len(behind)]
            # A turn that calls tools may end with another token than one that speaks.
            if end is not None and further_keys(response):
                last = max((i for i, token in enumerate(ids) if token in self._chat.special), default=-1)
                if last >= 0 and not str(self.tokenizer.decode(ids[last + 1 :])).strip():
                    return ids[: last + 1]
        return ids if ids[-1:] == [self._eos] else [*ids, self._eos]

    def fingerprint(self) -> str:
        """A digest of everything but the content that determines a record's tokens: 32 hex digits."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        tokenizer = self.tokenizer
        content = {
            "version": _FIRST_RULES,
            "tokenizer": tokenizer_content(tokenizer),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "chat_template": tokenizer.chat_template,
            "template_date": TEMPLATE_DATE,
            "truncation": asdict(self.truncation),
            **self._chat.settings,
        }
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def changed_id(record_id: str) -> str:
    """The id under which reference values of a record are stored whose tokens this version of the rules
    changed: 32 hex digits."""
    return hashlib.blake2b(f"{record_id} rules {RULES_VERSION}".encode(), digest_size=16).hexdigest()


def _array(ids: Tokens) -> npt.NDArray[Any]:
    return np.asarray(ids, dtype=np.int32)
