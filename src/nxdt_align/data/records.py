"""Records: what every format becomes, and the checks of the values that it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nxdt_align.errors import UserError

Message = dict[str, str]
"""``{"role": ..., "content": ...}``"""
Prompt = str | list[Message]
Row = Mapping[str, Any]
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_EXCERPT = 80


class DataError(UserError):
    """Data that cannot be read or used; the message names the file, the place and what to do."""


class BadRecord(Exception):
    """One record that cannot be used: ``reason`` is what it is counted under, ``detail`` what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def excerpt(value: Any) -> str:
    """The start of ``value`` on one line, for a message."""
    text = ascii(value) if isinstance(value, bytes) else repr(value)
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."


# Records


@dataclass(frozen=True)
class PairRecord:
    """A prompt, text or chat messages, with a preferred and a rejected response."""

    id: str
    """The content's hash: equal content, equal id, wherever it stands."""
    prompt: Prompt
    chosen: str
    rejected: str
    source: str
    """``file:line``, for messages."""

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class ResponseRecord:
    """A prompt, text or chat messages, with one response."""

    id: str
    prompt: Prompt
    response: str
    source: str

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.response,)


@dataclass(frozen=True)
class UnpairedRecord:
    """A prompt with one completion that is good or bad, and another prompt's completion."""

    id: str
    prompt: Prompt
    completion: str
    desirable: bool
    source: str
    mismatched: str = ""
    """See ``unpaired.with_mismatched``; empty before."""

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.completion, self.mismatched) if self.mismatched else (self.completion,)


Record = PairRecord | ResponseRecord | UnpairedRecord


def record_id(prompt: Prompt, responses: Sequence[str], label: bool | None = None) -> str:
    """The content's hash: 32 hex digits, blake2b over canonical JSON."""
    names = ("chosen", "rejected") if len(responses) == 2 else ("response",)
    content: dict[str, object] = {"prompt": prompt, **dict(zip(names, responses, strict=True))}
    if label is not None:
        content["label"] = label
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Draft:
    """A prompt and its responses: (chosen, rejected) for a pair, (response,) otherwise."""

    prompt: Prompt
    responses: tuple[str, ...]
    label: bool | None = None
    """Whether the response is desirable, of unpaired records."""


def to_record(draft: Draft, place: str) -> Record:
    """The record of a sound draft that stands at ``place``."""
    identifier = record_id(draft.prompt, draft.responses)
    if draft.label is not None:
        identifier = record_id(draft.prompt, draft.responses, draft.label)
        return UnpairedRecord(identifier, draft.prompt, draft.responses[0], draft.label, place)
    if len(draft.responses) == 2:
        return PairRecord(identifier, draft.prompt, draft.responses[0], draft.responses[1], place)
    return ResponseRecord(identifier, draft.prompt, draft.responses[0], place)


def with_mismatched(records: Sequence[Record]) -> list[Record]:
    """The records, each with the completion of the one before it (the first: the last one's).

    TRL rotates completions by one inside batches; here it is the whole data set, so that the pairing,
    and with it a stored reference value, does not depend on the batch size. Completions of the same
    prompt and equal ones are passed over. Raises DataError where a record is left without one.
    """
    found: list[Record] = []
    for i, record in enumerate(records):
        assert isinstance(record, UnpairedRecord)
        others = (records[i - k] for k in range(1, len(records)))
        before = next((other.responses[0] for other in others if _is_mismatched(record, other)), None)
        if before is None:
            raise DataError(
                f"{record.source}: KTO needs another prompt's completion beside each, but no other prompt of "
                "the data has another completion; its KL term is estimated from such pairs"
            )
        digest = hashlib.blake2b(f"{record.id}{before}".encode(), digest_size=16).hexdigest()
        found.append(replace(record, id=digest, mismatched=before))
    return found


def _is_mismatched(record: Record, other: Record) -> bool:
    return other.responses[0] != record.responses[0] and other.prompt != record.prompt


# Values


def take(row: Row, key: str) -> Any:
    """The value under ``key``. Raises BadRecord where it is missing or null."""
    value = row.get(key)
    if value is None:
        found = ", ".join(k for k, v in row.items() if v is not None) or "none"
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
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            around = value[max(error.start - 20, 0) : error.start + 20]
            raise BadRecord("not UTF-8", f"`{name}` holds {excerpt(around)}") from None
    return value


def as_message(value: Any, name: str) -> Message:
    """A chat message, ``{role, content}``, or ShareGPT's ``{from, value}``."""
    if not isinstance(value, Mapping):
        raise BadRecord("wrong type", f"`{name}` must be a message, but is {excerpt(value)}")
    if value.get("tool_calls"):
        raise BadRecord("wrong type", f"`{name}` calls tools, which are not supported: {excerpt(value)}")
    if value.get("from") is not None:
        role = SHAREGPT_ROLES.get(as_text(value["from"], f"{name}.from"))
        if role is None:
            roles = ", ".join(SHAREGPT_ROLES)
            raise BadRecord("unknown role", f"`{name}.from` is {excerpt(value['from'])}, not one of {roles}")
        return {"role": role, "content": as_text(take(value, "value"), f"{name}.value")}
    role = as_text(take(value, "role"), f"{name}.role")
    return {"role": role, "content": as_text(take(value, "content"), f"{name}.content")}


def as_messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadRecord("wrong type", f"`{name}` must be a list of messages, but is {excerpt(value)}")
    return [as_message(item, f"{name}[{i}]") for i, item in enumerate(value)]


def as_prompt(value: Any, name: str) -> Prompt:
    return as_messages(value, name) if isinstance(value, list) else as_text(value, name)


def as_answer(value: Any, name: str) -> str:
    """The text of one assistant turn: text, a message, or a list of one message."""
    if isinstance(value, str):
        return as_text(value, name)
    turns = as_messages(value, name) if isinstance(value, list) else [as_message(value, name)]
    if len(turns) > 1:
        found = f"after the turns that are shared, `{name}` goes on with {len(turns)} turns, not one"
        raise BadRecord("no common prompt", found)
    if not turns:
        raise BadRecord("no final assistant turn", f"`{name}` holds no turn")
    if turns[0]["role"] != "assistant":
        raise BadRecord("no final assistant turn", f"`{name}` is a turn of {excerpt(turns[0]['role'])}")
    return turns[0]["content"]
