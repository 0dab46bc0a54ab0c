"""Records to texts: the chat template, within limits of time and memory, and each special token once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from nxdt_align.data.chat import THINKING, ChatTemplate
from nxdt_align.data.records import (
    BadRecord,
    DataError,
    Message,
    Record,
    content_of,
    excerpt,
    further_keys,
)
from nxdt_align.data.rendering import MEMORY, SECONDS, Limits, OutOfTime
from nxdt_align.data.special_tokens import SpecialTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Texts(NamedTuple):
    prompt: str
    responses: list[str]


class Rendered(NamedTuple):
    """The texts of one record."""

    texts: Texts
    unread: tuple[str, ...] = ()
    before: Texts | None = None
    """What the first version of the rules tokenized, if it was another text."""


class RecordTexts:
    """What is tokenized of records."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._special = SpecialTexts.of(tokenizer)
        self._limits = Limits()

    def render(self, records: Sequence[Record]) -> list[Rendered | BadRecord]:
        """The texts of each record, or why it has none. Raises DataError where a chat record meets no
        template, or one that does not come to an end."""
        found: list[Rendered | BadRecord] = []
        while len(found) < len(records):
            begin = len(found)
            try:
                with self._limits.applied():
                    for record in records[begin:]:
                        found.append(self._texts_of(record))
            except OutOfTime:
                raise self._endless(records[len(found)], f"takes more than {SECONDS:.0f} s") from None
            except MemoryError:
                # Those before it have taken their share of the memory: the next round begins with this one.
                if len(found) == begin:
                    size = f"takes more than {MEMORY / 2**30:.0f} GiB of memory"
                    raise self._endless(records[begin], size) from None
        return found

    def _endless(self, record: Record, what: str) -> DataError:
        return DataError(
            f"{record.source}: the chat template of {self._tokenizer.name_or_path or 'the tokenizer'} {what} "
            "for this one conversation: mend its chat_template, use the tokenizer of another model "
            "(data.tokenizer.type), or give prompt and responses as text"
        )

    def _texts_of(self, record: Record) -> Rendered | BadRecord:
        keys = tuple(record.further_keys)
        if isinstance(record.prompt, str):
            before = Texts(record.prompt, [content_of(r) for r in record.responses])
            rendered = Rendered(self.once(before), keys, before)
        else:
            self._limits.start()
            try:
                rendered = self._of_chat(record, record.prompt, keys)
            except BadRecord as fault:
                return fault
            finally:
                self._limits.stop()
        if rendered.before == rendered.texts:
            rendered = rendered._replace(before=None)
        return (_fault_of_unread(record, rendered) if rendered.unread else None) or rendered

    def _of_chat(self, record: Record, prompt: list[Message], keys: tuple[str, ...]) -> Rendered:
        before = Texts(*self._chat.split(prompt, record.responses, record.source, record.tools))
        turns, answers = self._chat.once(prompt, record.responses)
        texts = before
        if turns is not prompt:
            texts = Texts(*self._chat.split(turns, answers, record.source, record.tools))
        once = self.once(texts, ends=self._chat.turn_end[0] is None)
        thinks = any("</think>" in content_of(response) for response in record.responses)
        return Rendered(once, self._chat.unread_keys(record, before) if keys or thinks else (), before)

    def once(self, texts: Texts, ends: bool = True) -> Texts:
        """The texts with each special token once; ``ends``: EOS, too."""
        if not any(map(self._special.occur_in, (texts.prompt, *texts.responses))):
            return texts  # As in most texts: the quick answer.
        of_response = self._special.response if ends else self._special.without_bos
        return Texts(self._special.prompt(texts.prompt), [of_response(text) for text in texts.responses])


def _fault_of_unread(record: Record, rendered: Rendered) -> BadRecord | None:
    """Why the record cannot be used without the keys that the template does not read."""
    turns = [turn for turn in record.responses if not isinstance(turn, str)]
    turns += [] if isinstance(record.prompt, str) else record.prompt
    for turn in turns:
        keys = further_keys(turn)
        if keys and not turn["content"].strip() and set(keys) <= set(rendered.unread):
            found = f"a turn of {turn['role']} has nothing but {_listed(keys)}"
            return BadRecord("empty turn", f"{found}, which the chat template does not read")
    if THINKING in rendered.unread and any(
        not content_of(response).rpartition("</think>")[2].strip() for response in record.responses
    ):
        found = f"a response has nothing but `{THINKING}`"
        return BadRecord("empty turn", f"{found}, which the chat template does not read")
    responses = rendered.texts.responses
    if record.label is None and len(set(responses)) < len(responses):
        both = excerpt(responses[0])
        found = f"both are {both}: the chat template does not read {_listed(rendered.unread)}"
        return BadRecord("chosen equal to rejected", found)
    return None


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
