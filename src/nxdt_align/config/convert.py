"""Converts plain YAML values to the schema's dataclasses and collects every fault.

Accepts an integer for a number, a whole number or a text for an integer, ``3e-4`` as a text (YAML 1.1
requires a dot in a float), a number for a text, and ``null`` for the default of a key that cannot be null.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin

from nxdt_align.config.aliases import FOREIGN_SECTIONS, advice_without_key, foreign_advice, loss_type_advice
from nxdt_align.config.faults import Fault, nearest, show
from nxdt_align.config.keys import alternatives, hints_of, key_fields, nearest_key, section_type, type_name
from nxdt_align.config.megatron import megatron_key
from nxdt_align.redaction import hide, looks_secret

T = TypeVar("T")

ALIASES = {
    "model.encoder_seq_len": "model.encoder_seq_length",
    "exp_manager.exp_log_dir": "exp_manager.explicit_log_dir",
    "async_exec_max_inflight_requests": "aync_exec_max_inflight_requests",
    "model_alignment_strategy.peft.rank": "model_alignment_strategy.peft.lora_rank",
    "model_alignment_strategy.peft.alpha": "model_alignment_strategy.peft.lora_alpha",
    "model_alignment_strategy.peft.dropout": "model_alignment_strategy.peft.lora_dropout",
}
"""Other spelling -> key. NxDT's tutorial and documentation write the first two."""

_VARIABLE = re.compile(r"\$\{?(\w+)")
_LARGEST = 2**63 - 1
_LONGEST_PATH, _LONGEST_PART = 4095, 255
"""Linux's."""
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Unfit(Exception):
    """A value of the wrong type; the message is the rule."""


@dataclass
class Walk:
    """What a conversion collects."""

    faults: list[Fault] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    """Paths of all keys that the YAML has."""
    auto: set[str] = field(default_factory=set)
    """Paths of those that are auto."""
    values: int = 0
    """How many have been resolved."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Path -> text as the YAML has it, where that reads environment variables whose names look secret."""
    secrets_read: int = 0
    """How often one was read."""


def build_section(section: type[T], values: Mapping[Any, Any], prefix: str, walk: Walk) -> T:
    """The dataclass ``section`` from ``values``. A faulty or missing key gets its default."""
    fields = {f.name: f for f in key_fields(section)}
    hints = hints_of(section)
    open_field = next((name for name, f in fields.items() if f.metadata.get("open")), None)
    built: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in values.items():
        name, path = str(key), f"{prefix}{key}"
        if path in ALIASES:
            _check_alias(path, value, values, walk)
        elif name in fields and name != open_field:
            _take(built, name, value, hints[name], fields[name].metadata, path, walk)
        elif megatron_key(path):
            walk.given.add(path)
        elif open_field is not None:
            rest[name] = value
            walk.given.add(path)
        else:
            walk.faults += _unknown(path, value)
    if open_field is not None:
        built[open_field] = rest
    return section(**built)


def _take(
    built: dict[str, Any],
    name: str,
    value: Any,
    hint: Any,
    metadata: Mapping[str, Any],
    path: str,
    walk: Walk,
) -> None:
    inner = section_type(hint)
    if value is None:
        walk.given.add(path)
        if type(None) in alternatives(hint):
            built[name] = None
    elif inner is not None:
        if isinstance(value, Mapping):
            built[name] = build_section(inner, value, f"{path}.", walk)
        else:
            walk.faults.append(Fault(path, "must be a section of keys", value))
    elif metadata.get("auto") and str(value).lower() == "auto":
        walk.given.add(path)
        walk.auto.add(path)
    else:
        walk.given.add(path)
        value = metadata.get("reads_as", {}).get(str(value).lower(), value)
        try:
            built[name] = _convert(hint, value, path, walk, is_path=bool(metadata.get("path")))
        except _Unfit as error:
            walk.faults.append(_unfit(error, hint, value, path))


def _unknown(path: str, value: Any) -> list[Fault]:
    """The fault of an unknown key, or those of the keys below a section of another library."""
    if isinstance(value, Mapping) and value:
        below = [fault for key, item in value.items() for fault in _unknown(f"{path}.{key}", item)]
        name = path.rpartition(".")[2]
        if name in FOREIGN_SECTIONS or any(foreign_advice(fault.path) for fault in below):
            return below
    near = nearest_key(path, takes_section=value is None or isinstance(value, Mapping))
    # Another library's name may also be one of ours in this section: dpo.beta is dpo.kl_beta.
    is_near = near is not None and near.rpartition(".")[0] == path.rpartition(".")[0]
    # But what is known of it goes before a name here that is alike: peft.apply_lora_to_mlp is no lora_alpha.
    advice = advice_without_key(path) if is_near else foreign_advice(path)
    return [Fault(path, "is not a known key", advice=advice or (f"did you mean {near}?" if near else ""))]


def _unfit(error: _Unfit, hint: Any, value: Any, path: str) -> Fault:
    choices = [str(c) for o in alternatives(hint) if get_origin(o) is Literal for c in get_args(o)]
    unknown = next((v for v in value if v not in choices), "") if isinstance(value, list) else value
    near = nearest(str(unknown), choices)
    advice = f"did you mean {near}?" if near else ""
    return Fault(path, str(error), value, loss_type_advice(path, unknown) or advice)


def _check_alias(path: str, value: Any, siblings: Mapping[Any, Any], walk: Walk) -> None:
    """``_with_aliases`` has already set the key itself; the two must agree."""
    key = ALIASES[path]
    other = siblings.get(key.rpartition(".")[2])
    if value is not None and other != value:
        rule = f"is another spelling of {key}, which is {show(other)}"
        walk.faults.append(Fault(path, rule, value, "keep one of them"))


def _convert(hint: Any, value: Any, path: str, walk: Walk, is_path: bool) -> Any:
    options = [option for option in alternatives(hint) if option is not type(None)]
    # Try the exact type first: for int | float, 2 must stay an int and 2.0 a float.
    exact = [option for option in options if type(value) is option]
    rule = ""
    for option in exact or options:
        try:
            return _convert_one(option, value, path, walk, is_path)
        except _Unfit as error:
            rule = str(error) or rule
    raise _Unfit(rule or "must be " + _wanted(options))


def _wanted(options: list[Any]) -> str:
    choices = [type_name(option).replace(" | ", ", ") for option in options if get_origin(option) is Literal]
    others = [
        "a list of them" if get_args(o)[:1] in [(c,) for c in options] else _with_article(type_name(o))
        for o in options
        if get_origin(o) is not Literal
    ]
    return " or ".join([*(f"one of {c}" if ", " in c else c for c in choices), *others])


def _with_article(name: str) -> str:
    if name in ("True or False", "text"):
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _convert_one(hint: Any, value: Any, path: str, walk: Walk, is_path: bool) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return _choice(get_args(hint), value)
    if origin is tuple:
        return _sequence(get_args(hint)[0], value, path, walk, is_path)
    if origin is not None:
        return _mapping(get_args(hint)[1], value)
    scalar = _SCALARS[hint](value)
    if is_path:
        _note_secrets(scalar, path, walk)
        return _path(scalar)
    return scalar


def _note_secrets(text: str, path: str, walk: Walk) -> None:
    """Variables that a path holds are expanded, as ``${oc.env:NAME}`` is."""
    for name in _VARIABLE.findall(text):
        variable = f"${{{name}}}"
        value = os.path.expandvars(variable)
        if value != variable and looks_secret(name):
            walk.secrets.setdefault(path, text)
            hide(value, f"${name}")


def _path(text: str) -> str:
    """``text`` with ``~`` and ``$HOME`` expanded. The system raises an error of its own for the refused ones,
    even where one only asks whether they exist."""
    path = os.path.expanduser(os.path.expandvars(text))
    if "\0" in path:
        raise _Unfit("must be a path, which has no zero byte")
    parts = path.encode(errors="replace").split(b"/")
    if max(map(len, parts)) > _LONGEST_PART or sum(map(len, parts)) + len(parts) > _LONGEST_PATH:
        raise _Unfit(
            f"must be a path of at most {_LONGEST_PATH} bytes, with at most {_LONGEST_PART} between two /"
        )
    return path


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    if value not in choices:
        raise _Unfit
    return value


def _sequence(item: Any, value: Any, path: str, walk: Walk, is_path: bool) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _Unfit
    if dataclasses.is_dataclass(item) and isinstance(item, type):
        # A plain value in a list of sections is the section's first key: callbacks: [my.Callback].
        first = key_fields(item)[0].name
        sections = [v if isinstance(v, Mapping) else {first: v} for v in value]
        return tuple(
            build_section(item, s, f"{path}.{i}.", Walk(faults=walk.faults, secrets=walk.secrets))
            for i, s in enumerate(sections)
        )
    return tuple(_convert_one(item, v, path, walk, is_path) for v in value)


def _mapping(item: Any, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _Unfit
    return {str(k): v if item is Any else _SCALARS[item](v) for k, v in value.items()}


def _boolean(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise _Unfit


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _Unfit
    try:
        number = float(value)
    except ValueError:
        raise _Unfit from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        # NaN compares false with everything, so a rule of the form `if value < bound` would accept it.
        raise _Unfit("must be a finite number")
    return number


def _integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        whole = value
    else:
        number = _number(value)
        if not number.is_integer():
            raise _Unfit
        whole = int(number)
    if abs(whole) > _LARGEST:
        raise _Unfit("must be an integer below 2^63, the largest that a tensor can hold")
    return whole


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _Unfit
    return str(value)


_SCALARS: dict[Any, Callable[[Any], Any]] = {bool: _boolean, int: _integer, float: _number, str: _text}
