"""Faults of a configuration, each with its path, collected into one error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nxdt_align.errors import UserError
from nxdt_align.redaction import redact

# None is a value that a key can have.
_NOTHING = object()
_LONGEST_VALUE = 120
_LONGEST_PATH = 500


@dataclass(frozen=True)
class Fault:
    """One rule that one key breaks. Reads: ``path: rule, but is VALUE; advice``."""

    path: str
    """The key, e.g. data.seq_length."""
    rule: str
    """The rule, as the rest of a sentence that begins with the key."""
    received: Any = _NOTHING
    """The value; left out if the rule already states it."""
    advice: str = ""
    """What to do."""
    involves: tuple[str, ...] = ()
    """Other keys that the rule reads; if one of them is faulty, this fault may follow from it."""
    is_missing_path: bool = False
    """Whether a file or folder is missing, perhaps only on this machine."""

    def __str__(self) -> str:
        received = "" if self.received is _NOTHING else f", but is {show(self.received)}"
        advice = f"; {self.advice}" if self.advice else ""
        return f"{shorten(self.path, _LONGEST_PATH)}: {self.rule}{received}{advice}"


class ConfigError(UserError):
    """Every fault of a configuration, in one message."""

    def __init__(self, faults: Sequence[Fault], source: str = "") -> None:
        self.faults = tuple(faults)
        self.source = source
        super().__init__(redact(_message(self.faults, source)))


def _message(faults: tuple[Fault, ...], source: str) -> str:
    where = f" in {source}" if source else ""
    if len(faults) == 1:
        return f"1 fault{where}: {faults[0]}"
    return f"{len(faults)} faults{where}:\n" + "\n".join(f"  - {fault}" for fault in faults)


def show(value: Any) -> str:
    """A value as a YAML would show it, truncated."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return shorten(repr(redact(value)))
    return shorten(redact(str(list(value)) if isinstance(value, tuple) else repr(value)))


def shorten(text: str, longest: int = _LONGEST_VALUE) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to ``name``, or else the first that begins with it."""
    candidates = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), list(candidates), n=1, cutoff=cutoff)
    close = close or [each for each in candidates if name and each.startswith(name.lower())]
    return candidates[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean X?``, or nothing."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else ""


def independent(faults: Iterable[Fault], earlier: Sequence[Fault]) -> list[Fault]:
    """``faults`` that do not follow from a key already known to be faulty."""
    broken = [fault.path for fault in earlier]

    def follows(path: str) -> bool:
        # A faulty section makes its keys suspect, and a faulty key its section.
        return any(path == b or path.startswith(f"{b}.") or b.startswith(f"{path}.") for b in broken)

    return [f for f in faults if not any(follows(path) for path in (f.path, *f.involves))]
