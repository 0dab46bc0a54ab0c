"""Chat messages to text by the tokenizer's own template, cut where the response begins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from nxdt_align.data.files import DataError, excerpt
from nxdt_align.data.values import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""Llama 3's templates print a date, and take today's unless told. This one is what they fall back to.
Without it the tokens, and with them every stored reference value, would change from day to day."""


class ChatTemplate:
    """The prompt's text is what the template gives with its generation prompt; a response's text is
    what it adds to that when the response stands there as the assistant's turn, end of turn included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def split(self, prompt: list[Message], responses: Sequence[str], place: str) -> tuple[str, list[str]]:
        """The texts of the prompt and of each response.

        Raises DataError where there is no template, where it refuses the conversation, or where the
        prompt's text is not the beginning of the conversation's.
        """
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{place}: the record holds chat messages, but the tokenizer has no chat template. Use the "
                "tokenizer of a chat model, add a chat_template to it, or give prompt and responses as text"
            )
        head = self._render(prompt, place, for_answer=True)
        answers = []
        for response in responses:
            full = self._render(
                [*prompt, {"role": "assistant", "content": response}], place, for_answer=False
            )
            if not full.startswith(head) or full == head:
                raise DataError(
                    f"{place}: the chat template writes a prompt with its answer otherwise than the prompt "
                    f"alone: {excerpt(full[-60:])} does not go on from {excerpt(head[-60:])}. Use another "
                    "template, or give prompt and responses as text"
                )
            answers.append(full[len(head) :])
        return head, answers

    def _render(self, messages: list[Message], place: str, *, for_answer: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=for_answer, date_string=TEMPLATE_DATE
            )
        except (TemplateError, ValueError) as error:
            raise DataError(
                f"{place}: the tokenizer's chat template refuses the conversation: {error}"
            ) from error
        assert isinstance(text, str)
        return text

    @cached_property
    def turn_end(self) -> tuple[int | None, list[int]]:
        """The special token that ends an assistant's turn (None: the template writes none), and the
        tokens, of white space, that the template writes behind it."""
        question: list[Message] = [{"role": "user", "content": "question"}]
        _, (answer,) = self.split(question, ["answer"], "chat template")
        after = answer.rpartition("answer")[2]
        ids: list[int] = self._tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        last = max((i for i, token in enumerate(ids) if token in special), default=None)
        return (None, []) if last is None else (ids[last], ids[last + 1 :])
