"""Typed values out of a Hugging Face ``config.json``, with every fault gathered."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

TokenIds = int | tuple[int, ...] | None

_REQUIRED: Any = object()


class Fields:
    """Reads typed values out of JSON and gathers the faults; a value at fault is None.

    A null counts as absent, except for token ids.
    """

    def __init__(self, values: Mapping[str, Any], faults: list[str] | None = None, prefix: str = "") -> None:
        self.values = values
        self.faults: list[str] = [] if faults is None else faults
        self._prefix = prefix

    def fault(self, key: str, rule: str, value: object) -> None:
        shown = value if isinstance(value, str) else json.dumps(value, default=str)
        self.faults.append(f"`{self._prefix}{key}` {rule}, but is {shown}")

    def part(self, key: str) -> Fields | None:
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            self.fault(key, "must be an object or null", value)
            return None
        return Fields(value, self.faults, f"{self._prefix}{key}.")

    def integer(self, key: str, default: int | None = _REQUIRED) -> int | None:
        value = self._take(key, default)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        self.fault(key, "must be an integer", value)
        return None

    def number(self, key: str, default: float | None = _REQUIRED) -> float | None:
        value = self._take(key, default)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        self.fault(key, "must be a finite number", value)
        return None

    def boolean(self, key: str, default: bool) -> bool | None:
        value = self._take(key, default)
        if isinstance(value, bool):
            return value
        self.fault(key, "must be true or false", value)
        return None

    def choice(self, key: str, choices: Sequence[str], default: str) -> Any:
        value = self._take(key, default)
        if value in choices:
            return value
        self.fault(key, f"must be one of {', '.join(choices)}", value)
        return None

    def token_ids(self, key: str, default: int | None) -> TokenIds:
        value = self.values.get(key, default)
        items = value if isinstance(value, list) else [0 if value is None else value]
        if not items or any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            self.fault(key, "must be an integer, a list of integers or null", value)
            return None
        return tuple(value) if isinstance(value, list) else value

    def _take(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            self.faults.append(f"`{self._prefix}{key}` is missing")
            return None
        return default
