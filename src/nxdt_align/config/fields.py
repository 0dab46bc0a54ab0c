"""Metadata of the schema's fields beyond type and default: bounds, and how a value is read."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nxdt_align.config.faults import ConfigError, Fault

PATH: dict[str, Any] = {"path": True}
"""A file or folder: ``~`` and ``$HOME`` are expanded."""

OPEN: dict[str, Any] = {"open": True}
"""A mapping that collects the section's other keys, e.g. an optimizer's arguments."""

INTERNAL: dict[str, Any] = {"internal": True}
"""Not a key of the YAML."""

AUTO: dict[str, Any] = {"auto": True}
"""May be ``auto`` in a YAML: the run chooses it, from the model and the device. ``Config.auto`` has the keys
that are; their fields hold the default until then."""


def reads_as(**replacements: Any) -> dict[str, Any]:
    """Alternative spellings: lower-case text of the YAML value -> the value it means."""
    return {"reads_as": replacements}


def is_dotted(path: str) -> bool:
    """Whether ``path`` has the form module.name; it is imported only when training starts."""
    return "." in path and all(part.isidentifier() for part in path.split("."))


LONGEST_NAME = 150
"""Bytes of a run's name: a checkpoint's adds steps, samples and an ending, and 255 is the system's limit."""
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def name_fault(path: str, name: str | None) -> Iterator[Fault]:
    """The fault of a name of which a folder or a file is made, inside the folder that holds it.

    Placeholders, ``{step}``, may hold anything.
    """
    if name is None:
        return
    plain = _PLACEHOLDER.sub("x", name)
    size = len(name.encode(errors="replace"))
    advice = "leave it out, or name the run"
    if not name.strip():
        yield Fault(path, "must not be empty", name, advice)
    elif "/" in plain or plain in (".", ".."):
        advice = "folders go into exp_manager.exp_dir or explicit_log_dir"
        yield Fault(path, "must be the name of one folder or file, without / and not . or ..", name, advice)
    elif not plain.isprintable():
        yield Fault(path, "must have printable characters only", name)
    elif size > LONGEST_NAME:
        yield Fault(path, f"must have at most {LONGEST_NAME} bytes, but has {size}", advice="shorten it")


# Bounds

_BOUNDS = {
    "above": ("above", operator.gt),
    "at_least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "at_most": ("at most", operator.le),
}


def number(default: Any, metadata: Mapping[str, Any] | None = None, **bounds: float) -> Any:
    """A field with ``bounds``: above, at_least, below, at_most. None is always within them."""
    return dataclasses.field(default=default, metadata={"bounds": bounds, **(metadata or {})})


def section_faults(section: Any, path: str) -> Iterator[Fault]:
    """The faults of a section (a dataclass of the schema) at ``path``.

    Checks the bounds of its fields and of its subsections, and its own rules: what its method ``faults``
    yields, with paths relative to the section.
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
    """Texts that are not among a key's choices; in a YAML, reading finds these."""
    for name, hint in get_type_hints(type(section)).items():
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        choices = [
            choice for option in options if get_origin(option) is Literal for choice in get_args(option)
        ]
        value = getattr(section, name)
        if choices and isinstance(value, str) and value not in choices:
            yield Fault(f"{path}{name}", f"must be one of {', '.join(choices)}", value)


def require_sound(section: Any, path: str) -> None:
    """Raise ConfigError with every fault of a section that was constructed in Python."""
    found = [*_broken_choices(section, f"{path}."), *section_faults(section, f"{path}.")]
    if found:
        raise ConfigError(found)
