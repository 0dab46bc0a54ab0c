"""The values of a raw record, checked: text, chat messages, an assistant turn. Raises BadRecord."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nxdt_align.data.files import BadRecord, excerpt

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
