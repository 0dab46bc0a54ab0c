"""Every key of the schema with type, default and meaning, read from the schema's source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nxdt_align.config.aliases import OTHER_NAMES, foreign_key
from nxdt_align.config.faults import nearest, show
from nxdt_align.config.megatron import MEGATRON_KEYS
from nxdt_align.config.schema import Config

_TYPE_NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "integer",
    float: "number",
    str: "text",
    Any: "any",
    type(None): "null",
}


@dataclass(frozen=True)
class Key:
    """One key of the YAML. For a section, ``default`` and ``type`` are empty."""

    path: str
    type: str
    default: str
    meaning: str
    hint: Any
    """The Python type."""
    is_section: bool


def hints_of(section: type) -> dict[str, Any]:
    """Field name -> type, of the fields that are keys of the YAML."""
    return {f.name: _resolved_hints(section)[f.name] for f in key_fields(section)}


def key_fields(section: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(section) if not f.metadata.get("internal")]


def section_type(hint: Any) -> type | None:
    """The dataclass of a section that ``hint`` is, or may be (``X | None``)."""
    options = [o for o in alternatives(hint) if isinstance(o, type) and dataclasses.is_dataclass(o)]
    return options[0] if options else None


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself if it is not a union."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def accepts_text(hint: Any) -> bool:
    return str in alternatives(hint)


@cache
def all_keys() -> dict[str, Key]:
    """Path -> key, in the order of the schema."""
    return {key.path: key for key in _walk(Config, "")}


def nearest_key(path: str, *, takes_section: bool = True) -> str | None:
    """The known key that ``path`` probably means: another library's name, else the same name elsewhere in the
    tree, else a similar name in the section, else a similar path. ``takes_section``: whether it may be a
    section, which no single value is meant for."""
    section, _, name = path.rpartition(".")
    known = [key.path for key in all_keys().values() if takes_section or not key.is_section]
    here = f"{section}.{OTHER_NAMES.get(name, '')}"
    if here in known:
        return here
    foreign = foreign_key(path)
    if foreign is not None:
        return foreign
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    if same_name:
        return same_name[0]
    siblings = {other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section}
    near = nearest(name, siblings)
    return f"{section}.{near}".lstrip(".") if near else nearest(path, known, cutoff=0.7)


def describe_keys(prefix: str = "") -> str:
    """The text of ``--help-keys``: each key under ``prefix``, and the known keys without effect."""
    chosen = [
        key
        for key in all_keys().values()
        if key.path == prefix or not prefix or key.path.startswith(f"{prefix}.")
    ]
    lines = [line for key in chosen for line in _describe(key)]
    if not prefix:
        lines += ["", "Known from NxDT's Megatron YAMLs, without effect here:"]
        lines += textwrap.wrap(", ".join(sorted(MEGATRON_KEYS)), 100, initial_indent="    ")
    return "\n".join(lines).strip("\n")


def _describe(key: Key) -> Iterator[str]:
    if key.is_section:
        yield ""
        yield f"{key.path}: {key.meaning}"
    else:
        yield f"{key.path}: {key.type} = {key.default}"
        yield from textwrap.wrap(key.meaning, 100, initial_indent="    ", subsequent_indent="    ")


def _walk(section: type, prefix: str) -> Iterator[Key]:
    meanings = field_docstrings(section)
    hints = hints_of(section)
    for field in key_fields(section):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        inner = section_type(hint)
        if inner is not None:
            unset = " Not set by default." if type(None) in alternatives(hint) else ""
            yield Key(path, "", "", _first_line(inner) + unset, hint, True)
            yield from _walk(inner, f"{path}.")
        else:
            kind = type_name(hint) + (" | auto" if field.metadata.get("auto") else "")
            yield Key(path, kind, _default(field), meanings.get(field.name, ""), hint, False)


def type_name(hint: Any) -> str:
    """A type in words: ``none | packed | null``, ``list of integer``."""
    if get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {type_name(get_args(hint)[0])}"
    if get_origin(hint) in (Mapping, dict):
        return "mapping"
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(hints_of(hint)) + "}" if isinstance(hint, type) else "mapping"
    options = alternatives(hint)
    if len(options) > 1:
        return " | ".join(type_name(option) for option in options)
    return _TYPE_NAMES.get(hint, str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return show(field.default_factory())
    return show(field.default)


def _first_line(section: type) -> str:
    return (inspect.getdoc(section) or "").splitlines()[0]


@cache
def _resolved_hints(section: type) -> dict[str, Any]:
    return get_type_hints(section)


@cache
def field_docstrings(section: type) -> dict[str, str]:
    """Field name -> the string below it in the source, on one line, those of the bases included."""
    inherited = [field_docstrings(base) for base in section.__bases__ if dataclasses.is_dataclass(base)]
    found = {name: text for base in inherited for name, text in base.items()}
    # Python discards strings below fields (PEP 224 was rejected), so they are read from the source.
    tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for statement, follower in itertools.pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            found[statement.target.id] = " ".join(str(follower.value.value).split())
    return found
