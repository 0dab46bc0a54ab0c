"""Texts to tokens: those of a prompt, the same for all of its responses, and those of each response; of many
records in one call of the tokenizer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from nxdt_align.data.chat import ChatTemplate
from nxdt_align.data.long_texts import LongTexts
from nxdt_align.data.record_texts import Rendered, Texts
from nxdt_align.data.records import BadRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = list[int]
_KNOWN_TAILS, _KNOWN_ENDINGS = 4096, 7
_TAIL = 200
"""Characters at a prompt's end that are searched for a place from which on to tokenize the conversation."""


class Parts(NamedTuple):
    """Tokens before BOS and EOS are seen to."""

    prompt: Tokens
    responses: list[Tokens]


Asking = Generator[list[str], list[Tokens], tuple[Parts, Parts]]
"""Asks for the tokens of texts, so that many records' are made in one call; ends with a record's tokens by
today's rules and by the first ones."""


class TextTokens:
    """The tokens of texts.

    Args:
        seq_length: tokens of a text beyond which it need not be tokenized.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate, seq_length: int) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self.long = LongTexts(tokenizer, lambda text: self.ids([text])[0], seq_length)
        self._tails: dict[str, Tokens] = {}
        self._endings: list[tuple[str, str]] = []
        """The last prompts' ends, each with its tail: most prompts of a template end alike."""

    def answered(self, asking: Sequence[Asking | BadRecord]) -> list[tuple[Parts, Parts] | BadRecord]:
        """What each ends with, with one call of the tokenizer for what all of them ask for at a time: the
        Rust tokenizer then works in parallel."""
        found: list[Any] = list(asking)
        waiting: list[tuple[int, list[Tokens] | None]] = [
            (at, None) for at, each in enumerate(asking) if not isinstance(each, BadRecord)
        ]
        while waiting:
            asked: list[tuple[int, list[str]]] = []
            for at, answer in waiting:
                try:
                    asked.append((at, asking[at].send(answer)))  # type: ignore[union-attr, arg-type]
                except StopIteration as end:
                    found[at] = end.value
                except BadRecord as fault:
                    found[at] = fault
            ids, begin = self.ids([text for _, texts in asked for text in texts]), 0
            waiting = []
            for at, texts in asked:
                waiting.append((at, ids[begin : begin + len(texts)]))
                begin += len(texts)
        return found

    def of(self, rendered: Rendered, *, is_chat: bool) -> Asking:
        """The tokens of a record's texts, see ``Asking``."""
        if not is_chat and not self.are_joined(rendered.texts):
            return self._apart(rendered)
        return self._together(rendered)

    def are_joined(self, texts: Texts) -> bool:
        """Whether texts that have white space at their border are one text: the space that the tokenizer puts
        before a text would be a second one. Where they have none, that space is what parts them."""
        if not self.long.adds_prefix:
            return False
        return texts.prompt[-1:].isspace() or any(answer[:1].isspace() for answer in texts.responses)

    def _apart(self, rendered: Rendered) -> Asking:
        now = yield from self._parts(rendered.texts)
        if rendered.before is None:
            return now, now
        return now, (yield from self._parts(rendered.before))

    def _together(self, rendered: Rendered) -> Asking:
        head, answers = rendered.texts
        tail = self._tail(head)
        known = self._tails.get(tail)
        # The prompt's tokens up to its tail are the same with any response behind it.
        alone, *wholes = yield from self._several(
            head, [*(() if known is not None else (tail,)), *(tail + a for a in answers)], len(tail)
        )
        if known is None:
            known, *wholes = wholes
            if len(self._tails) < _KNOWN_TAILS and len(tail) <= _TAIL:
                self._tails[tail] = known
        if alone[len(alone) - len(known) :] != known:
            tail, known = head, alone
            _, *wholes = yield from self._several(head, [tail + a for a in answers], len(tail))
        ends = [
            len(known) if whole[: len(known)] == known else self._before_border(tail, answer, whole, known)
            for whole, answer in zip(wholes, answers, strict=True)
        ]
        shared = min(ends)
        while any(whole[:shared] != wholes[0][:shared] for whole in wholes):
            shared -= 1
        prompt = [*alone[: len(alone) - len(known)], *wholes[0][:shared]]
        now = Parts(prompt, [whole[shared:] for whole in wholes])
        if rendered.before is not None:
            return now, (yield from self._parts(rendered.before))
        if shared == len(known) and self.long.splits:
            return now, now  # A border between words: each part has its own tokens.
        apart = yield from self._parts(Texts("", answers))
        return now, Parts(alone, apart.responses)

    def _parts(self, texts: Texts) -> Generator[list[str], list[Tokens], Parts]:
        prompt, *responses = yield from self._several(texts.prompt, texts.responses, 0)
        return Parts(prompt, responses)

    def _several(
        self, prompt: str, others: list[str], more: int
    ) -> Generator[list[str], list[Tokens], list[Tokens]]:
        """The tokens of a prompt, of which the last count, and of other texts, of which the first count,
        after ``more`` characters. Long ones are not tokenized any further than that."""
        long = self.long
        texts = [prompt, *others]
        if max(map(len, texts)) <= long.piece:
            return (yield texts)
        short = iter((yield [text for text in texts if len(text) <= long.piece]))
        return [
            next(short) if len(text) <= long.piece else (long.first(text, more) if at else long.last(text))
            for at, text in enumerate(texts)
        ]

    def _tail(self, head: str) -> str:
        """The end of a prompt from which on its tokens depend on what follows: an added token, which is a
        token whatever stands around it, or the border of a word."""
        known = next((tail for ending, tail in self._endings if head.endswith(ending)), None)
        if known is not None:
            return known
        for within in (_TAIL, len(head)):
            begin = max(len(head) - within, 0)
            found = [] if self._chat.added is None else self._chat.added.findall(head, begin)
            token = head.rindex(found[-1]) if found else -1
            border = self.long.last_border(head, within) or -1
            if max(token, border) >= 0:
                # Of a border, the letter before it belongs to what tells it.
                ending = head[token:] if token > border else head[border - 1 :]
                tail = head[max(token, border) :]
                if len(ending) <= _TAIL:
                    self._endings = [(ending, tail), *self._endings[:_KNOWN_ENDINGS]]
                return tail
        return head

    def _before_border(self, tail: str, answer: str, whole: Tokens, known: Tokens) -> int:
        """How many of the tokens of ``tail + answer`` lie wholly before the answer."""
        if not self._tokenizer.is_fast:
            return next((i for i, (a, b) in enumerate(zip(whole, known, strict=False)) if a != b), 0)
        count = 0
        for token, (begin, end) in zip(whole, self.long.offsets(tail + answer), strict=False):
            # An added token may take white space behind it, of the answer, too.
            if end > len(tail) and not (begin < len(tail) and token in self._chat.special):
                break
            count += 1
        return count

    def ids(self, texts: list[str]) -> list[Tokens]:
        """The tokens of each text, none added."""
        if not texts:
            return []
        backend = self._backend
        if backend is not None:
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
            backend.encode_special_tokens = self._tokenizer.split_special_tokens
            # The fast one keeps no offsets, which take half of the time.
            return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]
        # verbose=False: no warning about texts over model_max_length, which are truncated later.
        encoded = self._tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, verbose=False
        )
        ids: list[Tokens] = encoded["input_ids"]
        return ids

    @cached_property
    def _backend(self) -> Any | None:
        """What the tokenizer only hands texts to; None where it is no fast one, or does more than that."""
        from transformers import PreTrainedTokenizerFast

        own, plain = type(self._tokenizer), PreTrainedTokenizerFast
        names = ("__call__", "_encode_plus", "_batch_encode_plus")
        is_plain = all(getattr(own, name, None) is getattr(plain, name, None) for name in names)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return backend if is_plain and hasattr(backend, "encode_batch_fast") else None
