"""Records, the common form of every data format, and checks of their values."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from nxdt_align.errors import UserError

Message = dict[str, Any]
"""``{"role": ..., "content": ...}``, both text, and every further key that the data have (``tool_calls``,
``reasoning_content``, ...), for the chat template to read."""
Prompt = str | list[Message]
Response = str | Message
"""The text of an assistant's turn; the message itself where it has further keys."""
_TURN_KEYS = {"role", "content", "from", "value"}
Row = Mapping[str, Any]
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names, which some data have as ``role``: no template knows them."""
_EXCERPT = 80
EXAMPLES_PER_REASON = 3
OnBadRecord = Literal["error", "drop"]
BAD_PROMPTS_ADVICE = "fix them, or leave them out of the file"
BAD_RECORDS_ADVICE = "fix them, or set data.on_bad_record=drop to train without them"


class DataError(UserError):
    """Data that cannot be read or used; the message names the file, the position and what to do."""


class BadRecord(Exception):
    """One unusable record: ``reason`` is the category it is counted under, ``detail`` what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def excerpt(value: Any) -> str:
    """The start of ``value`` on one line, for a message."""
    text = ascii(value) if isinstance(value, bytes) else repr(value)
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."


@dataclass
class BadRecords:
    """Unusable records by reason, out of ``read`` records."""

    read: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason, ``file:line: detail``."""

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, place: str, fault: BadRecord) -> None:
        self.counts[fault.reason] += 1
        shown = self.examples.setdefault(fault.reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            shown.append(f"{place}: {fault.detail}")

    def merge(self, other: BadRecords) -> None:
        """Add those of records that come after these."""
        self.read += other.read
        self.counts.update(other.counts)
        for reason, examples in other.examples.items():
            shown = self.examples.setdefault(reason, [])
            shown += examples[: EXAMPLES_PER_REASON - len(shown)]

    def summary(self) -> str:
        """A paragraph with the totals, and for each reason its count and first examples."""
        lines = [f"{self.total} bad of {self.read} records"]
        for reason, count in self.counts.most_common():
            lines.append(f"  {reason}: {count}")
            lines += [f"    {example}" for example in self.examples[reason]]
            if count > len(self.examples[reason]):
                lines.append(f"    and {count - len(self.examples[reason])} more")
        return "\n".join(lines)


# Records


@dataclass(frozen=True)
class Record:
    """A prompt, text or chat messages, with its responses. A format creates it; the reader adds
    ``source``."""

    prompt: Prompt
    responses: tuple[Response, ...]
    """(chosen, rejected) of a pair, (response,), or (completion,) with a label, to which mismatched.py
    adds another prompt's; none of a prompt that is to be answered."""
    label: bool | None = None
    """Whether a labelled completion is desirable; None for pairs and single responses."""
    source: str = ""
    """``file:line``, for messages."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant may call, for the chat template."""

    @cached_property
    def id(self) -> str:
        """The content's hash, 32 hex digits, independent of file and position. Tokens and reference values
        are stored under it."""
        if self.label is None:
            return record_id(self.prompt, self.responses, tools=self.tools)
        completion, *mismatched = self.responses
        own = record_id(self.prompt, (completion,), self.label, self.tools)
        if not mismatched:
            return own
        other = mismatched[0]
        return _digest(own + (other if isinstance(other, str) else canonical(other)))

    @property
    def further_keys(self) -> list[str]:
        """The keys of its messages beside role and content, each once, and ``tools`` if it has any."""
        turns = [*(() if isinstance(self.prompt, str) else self.prompt), *self.responses]
        own = () if self.tools is None else ("tools",)
        return list(dict.fromkeys((*own, *(key for turn in turns for key in further_keys(turn)))))


def further_keys(turn: Response) -> list[str]:
    """The keys of a message beside role and content."""
    return [] if isinstance(turn, str) else [key for key in turn if key not in _TURN_KEYS]


def content_of(response: Response) -> str:
    """The text of a response, whatever other keys its message has."""
    return response if isinstance(response, str) else str(response["content"])


def record_id(
    prompt: Prompt,
    responses: Sequence[Response],
    label: bool | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The hash of a record's content: 32 hex digits, blake2b over canonical JSON."""
    names = ("chosen", "rejected") if len(responses) == 2 else ("response",)[: len(responses)]
    content: dict[str, object] = {"prompt": prompt, **dict(zip(names, responses, strict=True))}
    if label is not None:
        content["label"] = label
    if tools is not None:
        content["tools"] = tools
    return _digest(canonical(content))


# Made once, as json.dumps would make one for each record. default: further keys may hold what JSON has no
# type for, such as Arrow's dates.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str)


def canonical(content: object) -> str:
    """JSON that is the same for equal content."""
    return _CANONICAL.encode(content)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# Values


def take(row: Row, key: str) -> Any:
    """The value under ``key``. Raises BadRecord if it is missing or null."""
    value = row.get(key)
    if value is None:
        names = [str(k) for k, v in row.items() if v is not None]
        found = ", ".join(name if name.isprintable() else repr(name) for name in names) or "none"
        raise BadRecord("missing key", f"no `{key}`; the record has {found[:80]}")
    return value


def take_text(row: Row, key: str) -> str:
    return as_text(take(row, key), key)


def as_text(value: Any, name: str) -> str:
    """``value``, checked to be a string that can be encoded. ``name`` is for the message."""
    if not isinstance(value, str):
        raise BadRecord(
            "wrong type", f"`{name}` must be text, but is {type(value).__name__}: {excerpt(value)}"
        )
    # isascii is a flag lookup: most texts need no encoding to be checked.
    if not value.isascii():
        try:
            # JSON can hold lone surrogates ("\ud800"), which Python keeps but no tokenizer accepts.
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            around = value[max(error.start - 20, 0) : error.start + 20]
            raise BadRecord("not UTF-8", f"`{name}` holds {excerpt(around)}") from None
    return value


def as_message(value: Any, name: str) -> Message:
    """A chat message, ``{role, content}``, or ShareGPT's ``{from, value}``, with its further keys. A content
    may be a list of parts, all of them text.

    A further key that is null or empty counts as missing, and so does the content of a turn that has
    further keys: one that calls tools says nothing.
    """
    if not isinstance(value, Mapping):
        raise BadRecord("wrong type", f"`{name}` must be a message, but is {excerpt(value)}")
    further = {str(key): item for key, item in value.items() if key not in _TURN_KEYS and _says(item)}
    if further:
        as_text(json.dumps(further, ensure_ascii=False, default=str), name)
    if value.get("from") is not None:
        role = SHAREGPT_ROLES.get(as_text(value["from"], f"{name}.from"))
        if role is None:
            roles = ", ".join(SHAREGPT_ROLES)
            raise BadRecord("unknown role", f"`{name}.from` is {excerpt(value['from'])}, not one of {roles}")
        return {"role": role, "content": _content(value, "value", name, further), **further}
    role = as_text(take(value, "role"), f"{name}.role")
    return {"role": _ROLES.get(role, role), "content": _content(value, "content", name, further), **further}


def _says(value: Any) -> bool:
    return bool(value) if isinstance(value, str | list | tuple | Mapping) else value is not None


def _content(message: Row, key: str, name: str, further: Row) -> str:
    if message.get(key) is None and further:
        return ""
    content = take(message, key)
    if not isinstance(content, list):
        return as_text(content, f"{name}.{key}")
    return "".join(_text_of_part(part, f"{name}.{key}[{i}]") for i, part in enumerate(content))


def _text_of_part(part: Any, name: str) -> str:
    """The text of one part of a content: text, or ``{"type": "text", "text": ...}``."""
    if not isinstance(part, Mapping):
        return as_text(part, name)
    if part.get("type") != "text":
        found = (
            f"`{name}` is a part of type {excerpt(part.get('type'))}; only parts of type text can be trained"
        )
        raise BadRecord("wrong type", found)
    return as_text(take(part, "text"), f"{name}.text")


def as_tools(value: Any, name: str = "tools") -> list[dict[str, Any]]:
    """``tools``: a list of JSON schemas, or the JSON text of one. ``name`` is for the message."""
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRecord("wrong type", f"`{name}` is no JSON ({error}): {excerpt(value)}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRecord("wrong type", f"`{name}` must be a list of JSON schemas, but is {excerpt(value)}")
    as_text(json.dumps(tools, ensure_ascii=False, default=str), name)
    return [dict(tool) for tool in tools]


def as_messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadRecord("wrong type", f"`{name}` must be a list of messages, but is {excerpt(value)}")
    return [as_message(item, f"{name}[{i}]") for i, item in enumerate(value)]


def as_prompt(value: Any, name: str) -> Prompt:
    return as_messages(value, name) if isinstance(value, list) else as_text(value, name)


def as_answer(value: Any, name: str) -> Response:
    """One assistant turn, from text, a message, or a list of one message."""
    if isinstance(value, str):
        return as_text(value, name)
    turns = as_messages(value, name) if isinstance(value, list) else [as_message(value, name)]
    if len(turns) > 1:
        found = f"after the shared turns, `{name}` continues with {len(turns)} turns, not one"
        raise BadRecord("no common prompt", found)
    if not turns:
        raise BadRecord("no final assistant turn", f"`{name}` holds no turn")
    if turns[0]["role"] != "assistant":
        raise BadRecord("no final assistant turn", f"`{name}` is a turn of {excerpt(turns[0]['role'])}")
    return turns[0] if further_keys(turns[0]) else content_of(turns[0])
