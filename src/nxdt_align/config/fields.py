"""What a field of the schema says of its key beside type and default: its bounds, and how it is read."""

from __future__ import annotations

import dataclasses
import math
import operator
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nxdt_align.config.faults import ConfigError, Fault

PATH: dict[str, Any] = {"path": True}
"""A file or folder: ``~`` and ``$HOME`` are expanded."""

OPEN: dict[str, Any] = {"open": True}
"""A mapping of the keys of its section that are no fields, e.g. an optimizer's arguments."""

INTERNAL: dict[str, Any] = {"internal": True}
"""Not a key of the YAML."""


def reads_as(**replacements: Any) -> dict[str, Any]:
    """Other spellings that a value is taken for, by the text of the YAML value in lower case."""
    return {"reads_as": replacements}


def is_dotted(path: str) -> bool:
    """Whether ``path`` reads as module.name; whether it can be imported is seen at training."""
    return "." in path and all(part.isidentifier() for part in path.split("."))


# Bounds

_BOUNDS = {
    "above": ("above", operator.gt),
    "at_least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "at_most": ("at most", operator.le),
}


def number(default: Any, **bounds: float) -> Any:
    """A field whose value keeps ``bounds``: above, at_least, below, at_most. None is within all of them."""
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def section_faults(section: Any, path: str) -> Iterator[Fault]:
    """What is wrong with the values of a section, a dataclass of the schema, that stands at ``path``.

    The bounds of its fields, those of the sections in it, and the rules of its own: what its method
    ``faults`` yields, with paths that begin at the section.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from section_faults(value, f"{path}{field.name}.")
        elif value is not None:
            yield from _broken_bounds(f"{path}{field.name}", value, field.metadata.get("bounds", {}))
    if hasattr(section, "faults"):
        for fault in section.faults():
            involves = tuple(f"{path}{other}" for other in fault.involves)
            yield dataclasses.replace(fault, path=f"{path}{fault.path}", involves=involves)


def _broken_bounds(path: str, value: Any, bounds: dict[str, float]) -> Iterator[Fault]:
    if bounds and not (isinstance(value, int | float) and math.isfinite(value)):
        yield Fault(path, "must be a finite number", value)
        return
    for name, bound in bounds.items():
        word, keeps = _BOUNDS[name]
        if not keeps(value, bound):
            yield Fault(path, f"must be {word} {bound:g}", value)


def _broken_choices(section: Any, path: str) -> Iterator[Fault]:
    """Texts that are none of those that a key takes; in a YAML they are found when it is read."""
    for name, hint in get_type_hints(type(section)).items():
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        choices = [
            choice for option in options if get_origin(option) is Literal for choice in get_args(option)
        ]
        value = getattr(section, name)
        if choices and isinstance(value, str) and value not in choices:
            yield Fault(f"{path}{name}", f"must be one of {', '.join(choices)}", value)


def require_sound(section: Any, path: str) -> None:
    """Raise ConfigError with every fault of a section that was made by hand."""
    found = [*_broken_choices(section, f"{path}."), *section_faults(section, f"{path}.")]
    if found:
        raise ConfigError(found)
