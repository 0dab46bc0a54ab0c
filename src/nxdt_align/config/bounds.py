"""Bounds of a YAML and its overrides, checked before anything is built from them.

A few lines of YAML can ask for more memory, time or recursion than there is: aliases of aliases double at
each line, and readers call themselves once per bracket. The text is read as events, which cost no more than
its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf._utils import get_yaml_loader

from nxdt_align.config.faults import show
from nxdt_align.errors import UserError

MAX_DEPTH = 32
MAX_VALUES = 20_000
_MAX_BYTES = 2**20
_MAX_KEY = 200
_MAX_OVERRIDE = 100_000
_MAX_DIGITS = 400
_LONG_TEXT = 64
"""Characters of a text that count as one value more."""

_NUMBER = re.compile(r"[-+]?(0[xob])?[0-9a-fA-F_:]+")
_DIGITS = re.compile(rf"[0-9a-fA-F_:]{{{_MAX_DIGITS + 1}}}")
_UNWRITABLE = re.compile(r"[\0\ud800-\udfff]")
_REFERENCE = re.compile(r"\$\{\s*(\.*)([\w.\[\]-]+)\s*\}")

_DEEP = f"is nested more than {MAX_DEPTH} deep; no key here is"
_LARGE = f"stands for more than {MAX_VALUES:,} values"


@dataclass
class _Node:
    """A collection that is being read, or that has an anchor."""

    anchor: str | None
    values: int = 1
    height: int = 0
    """Of what lies below it; a text, which is no collection, has -1."""

    def add(self, values: int, height: int) -> None:
        self.values += values
        self.height = max(self.height, height)


def check_yaml_text(text: str, path: Path) -> None:
    """Raise UserError, with file and line, for a YAML that is too large, too deep or holds what no text can.

    Aliases count as often as they are used. Raises PyYAML's errors for what is not YAML.
    """
    if len(text) > _MAX_BYTES:
        raise UserError(f"{path} has {len(text):,} characters; a configuration has at most {_MAX_BYTES:,}")
    loader = get_yaml_loader()(text)
    try:
        _check_events(loader, path)
    finally:
        loader.dispose()


def _check_events(loader: Any, path: Path) -> None:
    stack = [_Node(None)]
    anchors: dict[str, _Node] = {}
    while loader.check_event():
        event = loader.get_event()
        # PyYAML's classes, told by name as this package does not import it.
        kind = type(event).__name__
        fault = ""
        if kind == "ScalarEvent":
            size = 1 + len(event.value) // _LONG_TEXT
            stack[-1].add(size, 0)
            anchors[event.anchor] = _Node(event.anchor, size, height=-1)
            fault = _scalar_fault(event)
        elif kind == "AliasEvent":
            if any(event.anchor == node.anchor for node in stack):
                fault = f"the alias *{event.anchor} lies inside what it stands for; write the values out"
            known = anchors.get(event.anchor, _Node(None))
            stack[-1].add(known.values, known.height + 1)
        elif kind in ("SequenceStartEvent", "MappingStartEvent"):
            stack.append(_Node(event.anchor))
        elif kind in ("SequenceEndEvent", "MappingEndEvent"):
            done = stack.pop()
            anchors[done.anchor or ""] = done
            stack[-1].add(done.values, done.height + 1)
        if len(stack) - 1 + stack[-1].height > MAX_DEPTH:
            fault = _DEEP
        elif sum(node.values for node in stack) > MAX_VALUES:
            fault = f"{_LARGE}, aliases written out; write fewer"
        if fault:
            mark = event.start_mark
            raise UserError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: {fault}")


def _scalar_fault(event: Any) -> str:
    if _UNWRITABLE.search(event.value):
        return f"the text {show(event.value)} holds a zero byte or half a character (a surrogate); remove it"
    is_plain = event.style is None and event.implicit[0]
    if is_plain and len(event.value) > _MAX_DIGITS and _NUMBER.fullmatch(event.value):
        count = f"{len(event.value):,}"
        return f"a number of {count} digits; one has at most {_MAX_DIGITS}; quote it if it is a text"
    if "${" in event.value and _nesting(event.value) > MAX_DEPTH:
        return f"the interpolation {show(event.value)} {_DEEP}"
    return ""


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest


def check_override(text: str) -> None:
    """Raise UserError for an override that is too long or too deep, or that no text can be."""
    key, equals, value = text.partition("=")
    about = f"the override {show(text)}"
    if _UNWRITABLE.search(text):
        raise UserError(f"{about} holds a zero byte, or bytes that are not UTF-8; remove them")
    if len(text) > _MAX_OVERRIDE:
        raise UserError(f"{about} has {len(text):,} characters; one has at most {_MAX_OVERRIDE:,}")
    if len(key) > _MAX_KEY:
        raise UserError(
            f"{about}: its key has {len(key):,} characters, but none here has more than {_MAX_KEY}; "
            "overrides are key=value, +key=value or ~key"
        )
    if key.count(".") >= MAX_DEPTH or (equals and _nesting(value) > MAX_DEPTH):
        raise UserError(f"{about} {_DEEP}")


def check_quoted_override(text: str) -> None:
    """As ``check_override``, once texts are quoted: what is not is read as numbers."""
    _, _, value = text.partition("=")
    if value[:1] not in ("'", '"') and _DIGITS.search(value):
        raise UserError(f"the override {show(text)} holds a number of more than {_MAX_DIGITS} digits")


def check_interpolations(values: Mapping[Any, Any], path: Path) -> None:
    """Raise UserError if resolving all interpolations of ``values`` (unresolved) would take too long: each
    reference is resolved anew, so that references to references double at each."""
    texts = {tuple(keys): text for keys, text in _texts(values, [])}
    below: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for keys in texts:
        for size in range(len(keys) + 1):
            below.setdefault(keys[:size], []).append(keys)
    costs: dict[tuple[str, ...], int] = {}

    def cost(wanted: tuple[str, ...]) -> int:
        """Of a key or a section."""
        if wanted not in costs:
            costs[wanted] = 0  # what refers to itself is OmegaConf's to refuse
            inner = below.get(wanted, [])
            costs[wanted] = cost_of_text(wanted) if inner == [wanted] else sum(map(cost, inner))
        return costs[wanted]

    def cost_of_text(keys: tuple[str, ...]) -> int:
        found = 1 + len(texts[keys]) // _LONG_TEXT
        for dots, name in _REFERENCE.findall(texts[keys]):
            start = keys[: len(keys) - len(dots)] if dots else ()
            found += cost((*start, *re.findall(r"[\w-]+", name)))
            if found > MAX_VALUES:
                where = ".".join(keys)
                raise UserError(f"{path}: {where}: {show(texts[keys])} {_LARGE}; write the values out")
        return found

    if cost(()) > MAX_VALUES:
        raise UserError(f"{path}: its interpolations give more than {MAX_VALUES:,} values; write fewer")


def _texts(value: Any, keys: list[str]) -> Iterator[tuple[list[str], str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, [*keys, str(key)])
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, [*keys, str(number)])
    else:
        yield keys, value if isinstance(value, str) else ""
