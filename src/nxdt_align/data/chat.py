"""What a chat template writes for a prompt, and for each of its responses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nxdt_align.data.records import (
    BadRecord,
    DataError,
    Message,
    Record,
    Response,
    content_of,
    excerpt,
)
from nxdt_align.data.rendering import LONGEST_TEXT
from nxdt_align.data.special_tokens import SpecialTexts, ends_at
from nxdt_align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[dict[str, Any]] | None
TEMPLATE_DATE = "26 Jul 2024"
"""Llama 3's templates print a date, today's by default; this is their own fallback. Without a fixed date the
tokens, and with them every stored reference value, would change daily."""
_DATE = datetime.strptime(TEMPLATE_DATE, "%d %b %Y")
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f" | replace('{code}', '{_DATE.strftime(code)}')"
        for code in re.findall(r"%-?\w", "%d%-d%b%B%m%-m%Y%y%a%A%j%H%I%M%S%p")
    )
    + " }}{%- endmacro +%}"
)
"""Put before a template that asks for the date by no other way: transformers hands it data alone."""
THINKING = "<think>…</think>"
"""Names, among the keys that a template does not read, the reasoning in a response's content."""
_ANSWER = "\ue000answer\ue001"
"""Stands for an answer, to see where a template writes one."""


class ChatTemplate:
    """The prompt's text is the template's output with its generation prompt; a response's text is what the
    template writes in that place for the response as the assistant's turn, end of turn included.

    Where the generation prompt opens what the template does not write into every turn (R1's ``<think>``), the
    prompt ends before that. ``variables``: of the template, such as ``enable_thinking``.

    Raises UserError for a variable that the template does not read.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._special = SpecialTexts.of(tokenizer)
        self._variables = dict(variables or {})
        for name in self._variables:
            if tokenizer.chat_template and not self._reads(name):
                whose = tokenizer.name_or_path or "the tokenizer"
                raise UserError(
                    f"data.chat_template_kwargs: the chat template of {whose} does not read `{name}`; "
                    "correct the name, or remove it"
                )

    def split(
        self, prompt: list[Message], responses: Sequence[Response], place: str, tools: Tools = None
    ) -> tuple[str, list[str]]:
        """The texts of the prompt and of each response. ``tools``: see Record.

        Raises DataError where there is no template; BadRecord where it refuses the conversation, or where
        the prompt's text is not the beginning of the conversation's.
        """
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{place}: the record holds chat messages, but the tokenizer has no chat template. Use the "
                "tokenizer of a chat model, add a chat_template to it, or give prompt and responses as text"
            )
        (head,) = self._render([prompt], tools, for_answer=True)
        wholes = [[*prompt, _as_turn(response)] for response in responses]
        fulls = self._render(wholes, tools, for_answer=False) if wholes else []
        begins = len(head)
        if not all(_continues(full, head) for full in fulls):
            head, begins = self._place(prompt, head, fulls, tools)
        return head, [full[begins:] for full in fulls]

    def _place(self, prompt: list[Message], head: str, fulls: list[str], tools: Tools) -> tuple[str, int]:
        """The prompt's text, and where in ``fulls`` the responses begin, of a template that writes the prompt
        otherwise when an answer follows than as ``head``."""
        (shown,) = self._render([[*prompt, _as_turn(_ANSWER)]], tools, for_answer=False)
        (asked,) = self._render([prompt], tools, for_answer=False)
        before, found, _ = shown.partition(_ANSWER)
        if found and all(text.startswith(asked) for text in (head, before, *fulls)):
            # Not every turn has what the generation prompt opens: DeepSeek-R1's <think>.
            shared = _alike(head, before, *fulls, begin=len(asked))
            if shared < len(before):
                shared = max((at for at in self._opens_at(head, len(asked)) if at <= shared), default=0)
            if shared >= len(asked) and all(_continues(full, head[:shared]) for full in fulls):
                return head[:shared], shared
        last = prompt[-1]["content"].strip()
        for begins in (len(before), len(before.rstrip())):
            # A part of the prompt is there only while the prompt is last: Mistral's system prompt.
            same = head[len(head) - _alike(head[::-1], before[:begins][::-1]) :]
            is_written = found and last and last in same
            if is_written and all(_continues(full, before[:begins]) for full in fulls):
                return head, begins
        full = next(full for full in fulls if not _continues(full, head))
        raise BadRecord(
            "no place for an answer in the chat template",
            "the chat template renders a prompt with an answer differently from the prompt "
            f"alone: {excerpt(full[-60:])} does not continue {excerpt(head[-60:])}. Use another "
            "template, or give prompt and responses as text",
        )

    def _opens_at(self, text: str, begin: int) -> list[int]:
        """Where added tokens, and thinking, begin in ``text`` from ``begin`` on."""
        thinking = re.compile("<think>")
        return [m.start() for each in (self.added, thinking) if each for m in each.finditer(text, begin)]

    def unread_keys(self, record: Record, texts: tuple[str, list[str]]) -> tuple[str, ...]:
        """The further keys of the record without which the template writes the same ``texts``; THINKING where
        it leaves out that of a response."""
        assert not isinstance(record.prompt, str)
        unread = [THINKING] if any(map(_lost_thinking, record.responses, texts[1])) else []
        for key in record.further_keys:
            prompt = [_without(turn, key) for turn in record.prompt]
            responses = [r if isinstance(r, str) else _without(r, key) for r in record.responses]
            try:
                tools = None if key == "tools" else record.tools
                same = self.split(prompt, responses, record.source, tools) == texts
            except BadRecord:
                same = False
            if same:
                unread.append(key)
        return tuple(unread)

    def once(
        self, prompt: list[Message], responses: Sequence[Response]
    ) -> tuple[list[Message], list[Response]]:
        """The turns without what the template writes around them: a BOS at the start of a content; at its end
        the token that ends its turn, or EOS, and white space behind it. The turns themselves where there is
        nothing to remove.

        A token at the end is kept in a turn that the template does not close with one.
        """
        written = [text for text in (self._special.bos, *self._closers) if text]
        contents = [turn if isinstance(turn, str) else turn["content"] for turn in (*prompt, *responses)]
        if not any(text in content for content in contents for text in written):
            return prompt, list(responses)  # As in most records: the quick answer.
        turns = [*prompt, *map(_as_turn, responses)]
        shorter = [self._shortened(turn) for turn in turns]
        if shorter == contents:
            return prompt, list(responses)
        split = len(prompt)
        for answer in range(split, len(turns)):
            places = [*range(split if answer == split else 0), answer]
            closed = self._closed(turns, shorter, [*range(split), answer])
            for at in places:
                if at not in closed:
                    shorter[at] = self._special.without_bos(turns[at]["content"])
        cleaned = [{**turn, "content": text} for turn, text in zip(turns, shorter, strict=True)]
        answers: list[Response] = [
            turn["content"] if isinstance(response, str) else turn
            for turn, response in zip(cleaned[split:], responses, strict=True)
        ]
        return cleaned[:split], answers

    def _shortened(self, turn: Message) -> str:
        text = self._special.without_bos(turn["content"])
        pad = self._special.pad
        end = ends_at(text, [*self._closers, pad] if pad else self._closers, must_have=self._closers)
        return text if end is None else text[:end]

    def _closed(self, turns: list[Message], shorter: list[str], conversation: list[int]) -> set[int]:
        """Which turns of a conversation the template ends with a token, however it writes their content."""
        marks = {at: f"\ue000{at}\ue001" for at in conversation if shorter[at] != turns[at]["content"]}
        marked = [
            {**turns[at], "content": shorter[at] + marks[at]} if at in marks else turns[at]
            for at in conversation
        ]
        try:
            (text,) = self._render([marked], None, for_answer=False)
        except BadRecord:
            return set()
        closers = tuple(self._closers)
        return {at for at, mark in marks.items() if text.rpartition(mark)[2].lstrip().startswith(closers)}

    @cached_property
    def _closers(self) -> list[str]:
        end, _ = self.turn_end
        texts = [None if end is None else str(self._tokenizer.convert_ids_to_tokens(end)), self._special.eos]
        return [text for text in dict.fromkeys(texts) if text]

    def _render(self, conversations: list[list[Message]], tools: Tools, *, for_answer: bool) -> list[str]:
        """The text of each conversation: in one call, as each has its price."""
        if not all(conversations):
            raise BadRecord("refused by the chat template", _refusal(ValueError("it has no message")))
        variables: dict[str, Any] = {"date_string": TEMPLATE_DATE, **self._variables}
        if self._asks_clock:
            variables["chat_template"] = self._with_fixed_clock(tools)
        try:
            texts = self._tokenizer.apply_chat_template(
                conversations,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=for_answer,
                **variables,
            )
        except MemoryError:
            raise  # The template's limit, see Limits.
        # A template is a program: it refuses with TemplateError, and may run into any fault of Python's.
        except Exception as error:
            refusal = _refusal(error)
            if "system" in refusal.lower() and any(t["role"] == "system" for c in conversations for t in c):
                refusal += "; write the system turn's text at the start of the first user turn"
            raise BadRecord("refused by the chat template", refusal) from error
        found = [str(text) for text in texts]
        longest = max(map(len, found))
        if longest > LONGEST_TEXT:
            raise BadRecord(
                "too long",
                f"the tokenizer's chat template writes {longest:,} characters for the conversation, more "
                f"than {LONGEST_TEXT:,}; shorten the record, or mend the template",
            )
        return found

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

    @cached_property
    def added(self) -> re.Pattern[str] | None:
        """Finds the texts of added tokens, the longest first; None where there are none that are tokens
        whatever stands around them."""
        if not self._tokenizer.is_fast:
            return None
        added = sorted({str(token) for token in self._tokenizer.added_tokens_decoder.values()}, key=len)
        return re.compile("|".join(map(re.escape, reversed(added)))) if added else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What a fingerprint needs beside the template: nothing for most."""
        found: dict[str, Any] = {"chat_template_kwargs": self._variables} if self._variables else {}
        if self._asks_clock:
            found["template_now"] = TEMPLATE_DATE  # Earlier versions gave these templates the day's date.
        return found

    @cached_property
    def _asks_clock(self) -> bool:
        return self._reads("strftime_now") and not self._reads("date_string")

    def _with_fixed_clock(self, tools: Tools) -> str:
        return _FIXED_CLOCK + str(self._tokenizer.get_chat_template(tools=list(tools) if tools else None))

    def _reads(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", str(self._tokenizer.chat_template)) is not None


def _continues(full: str, beginning: str) -> bool:
    return full.startswith(beginning) and full != beginning


def _alike(first: str, *others: str, begin: int = 0) -> int:
    """Up to where the texts are alike, which they are up to ``begin``."""
    places = range(begin, min(len(text) for text in (first, *others)))
    different = (at for at in places if any(other[at] != first[at] for other in others))
    return next(different, len(places) + begin)


def _lost_thinking(response: Response, text: str) -> bool:
    """Whether the template left out the reasoning that a response's content begins with."""
    thinking, closed, _ = content_of(response).partition("</think>")
    return bool(closed) and thinking.rpartition("<think>")[2].strip() not in text


def _without(turn: Message, key: str) -> Message:
    return {name: value for name, value in turn.items() if name != key}


def _as_turn(response: Response) -> Message:
    return {"role": "assistant", "content": response} if isinstance(response, str) else response


def _refusal(error: Exception) -> str:
    if isinstance(error, TypeError) and "no loader" in str(error):
        return (
            "the tokenizer's chat template includes, imports or extends another template, which a tokenizer "
            "cannot hold: write it out in its chat_template"
        )
    if isinstance(error, RecursionError):
        return "the tokenizer's chat template calls itself without end (a macro or a recursive loop)"
    named = str(error) or type(error).__name__
    return f"the tokenizer's chat template refuses the conversation: {named}"
