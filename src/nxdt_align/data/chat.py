"""What a chat template writes for a prompt, and for each of its responses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from nxdt_align.data.records import BadRecord, DataError, Message, Record, Response, excerpt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""Llama 3's templates print a date, today's by default; this is their own fallback. Without a fixed date the
tokens, and with them every stored reference value, would change daily."""


class ChatTemplate:
    """The prompt's text is the template's output with its generation prompt; a response's text is what the
    template adds to that for the response as the assistant's turn, end of turn included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def split(
        self, prompt: list[Message], responses: Sequence[Response], place: str
    ) -> tuple[str, list[str]]:
        """The texts of the prompt and of each response.

        Raises DataError where there is no template; BadRecord where it refuses the conversation, or where
        the prompt's text is not the beginning of the conversation's.
        """
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{place}: the record holds chat messages, but the tokenizer has no chat template. Use the "
                "tokenizer of a chat model, add a chat_template to it, or give prompt and responses as text"
            )
        head = self._render(prompt, for_answer=True)
        answers = []
        for response in responses:
            answer = {"role": "assistant", "content": response} if isinstance(response, str) else response
            full = self._render([*prompt, answer], for_answer=False)
            if not full.startswith(head) or full == head:
                raise BadRecord(
                    "no common beginning in the chat template",
                    "the chat template renders a prompt with an answer differently from the prompt "
                    f"alone: {excerpt(full[-60:])} does not continue {excerpt(head[-60:])}. Use another "
                    "template, or give prompt and responses as text",
                )
            answers.append(full[len(head) :])
        return head, answers

    def unread_keys(self, record: Record, texts: tuple[str, list[str]]) -> tuple[str, ...]:
        """The further keys of the record's messages without which the template writes the same ``texts``."""
        assert not isinstance(record.prompt, str)
        unread = []
        for key in record.further_keys:
            prompt = [_without(turn, key) for turn in record.prompt]
            responses = [r if isinstance(r, str) else _without(r, key) for r in record.responses]
            try:
                same = self.split(prompt, responses, record.source) == texts
            except BadRecord:
                same = False
            if same:
                unread.append(key)
        return tuple(unread)

    def _render(self, messages: list[Message], *, for_answer: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=for_answer, date_string=TEMPLATE_DATE
            )
        # A template refuses with TemplateError; one that meets a value of another type than it expects
        # raises what that operation of Python raises.
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            raise BadRecord(
                "refused by the chat template",
                f"the tokenizer's chat template refuses the conversation: {error}",
            ) from error
        assert isinstance(text, str)
        return text

    @cached_property
    def turn_end(self) -> tuple[int | None, list[int]]:
        """The special token that ends an assistant's turn (None: the template writes none), and the
        white-space tokens that the template writes after it."""
        question: list[Message] = [{"role": "user", "content": "question"}]
        try:
            _, (answer,) = self.split(question, ["answer"], "chat template")
        except BadRecord as fault:
            raise DataError(f"of one question and its answer, {fault.detail}") from fault
        after = answer.rpartition("answer")[2]
        ids: list[int] = self._tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        last = max((i for i, token in enumerate(ids) if token in self.special), default=None)
        return (None, []) if last is None else (ids[last], ids[last + 1 :])

    @cached_property
    def special(self) -> frozenset[int]:
        return frozenset((*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder))


def _without(turn: Message, key: str) -> Message:
    return {name: value for name, value in turn.items() if name != key}
