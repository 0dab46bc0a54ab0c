"""Marks on schema fields that change how a key is read."""

from __future__ import annotations

from typing import Any

PATH: dict[str, Any] = {"path": True}
"""A file or folder: ``~`` and ``$HOME`` are expanded."""

OPEN: dict[str, Any] = {"open": True}
"""A mapping that takes up keys of its section that are no fields, e.g. an optimizer's arguments."""

INTERNAL: dict[str, Any] = {"internal": True}
"""Not a key of the YAML."""


def reads_as(**replacements: Any) -> dict[str, Any]:
    """Other spellings that a value is taken for, by the text of the YAML value in lower case."""
    return {"reads_as": replacements}
