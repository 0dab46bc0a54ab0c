"""Overrides with several values each, ``key=a,b``, as the combinations of one value each.

In Hydra's grammar, as its basic sweeper takes it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from nxdt_align.config.keys import all_keys
from nxdt_align.errors import UserError

_ALIGN = "model_alignment_strategy"
_LONGEST_VALUE = 40
_DIGEST = 8
"""Characters of a value's digest in a label."""


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    label: str
    """``kl_beta=0.1,lr=1e-06``: a folder's name, different for each combination, in whatever order the values
    were given. That of another one where all values are the same."""
    overrides: tuple[str, ...]
    """All of the run's, one value each, in the order in which they were given."""


def combinations(overrides: Sequence[str], full_key: Callable[[str], str]) -> list[Combination]:
    """One for each choice of a value per override; the last one's values change fastest.

    An override has several values where commas stand between them, outside quotes, brackets and braces, or by
    ``choice(a,b)`` and ``range(1,4)``. ``full_key``: of a swept key, see ``key_by_name``.

    Raises UserError where no override has several, or has what is no list of values.
    """
    choices = [list(_values(text, full_key)) for text in overrides]
    swept = [values[0][0] for values in choices if len(values) > 1]
    if not swept:
        raise UserError(
            "no key has several values: write them with commas, e.g. model.optim.lr=1e-6,3e-6; a list is one "
            "value, [a,b], and so is a text in quotes, \"'a,b'\""
        )
    repeated = next((key for key in swept if swept.count(key) > 1), None)
    if repeated is not None:
        raise UserError(f"{repeated}: is given several values twice; give all of them once")
    names = dict(zip(swept, _short(swept), strict=True))
    # Of those alone with several values; their key may also be given one before.
    labels = [
        {each: f"{names[values[0][0]]}={label}" for each, label in _labels([v for _, v, _ in values]).items()}
        if len(values) > 1
        else {}
        for values in choices
    ]
    return [
        Combination(
            ",".join(of[value] for of, (_, value, _) in zip(labels, chosen, strict=True) if of),
            tuple(text for _, _, text in chosen),
        )
        for chosen in itertools.product(*choices)
    ]


def first_values(overrides: Sequence[str]) -> list[str]:
    """The overrides with the first of their values. Raises UserError as ``combinations``."""
    return [next(_values(text, lambda key: key))[2] for text in overrides]


def key_by_name(name: str, objective: str) -> str:
    """The key that ``name`` is the last part of, ``kl_beta`` for instance, where there is one such key, or
    one in the section of ``objective``; else ``name``."""
    if name in all_keys() or "." in name:
        return name
    found = [key for key, known in all_keys().items() if key.endswith(f".{name}") and not known.is_section]
    if len(found) > 1:
        found = [key for key in found if key.startswith(f"{_ALIGN}.{objective}.")]
    return found[0] if len(found) == 1 else name


_Value = tuple[str, str, str]
"""Key without Hydra's +, value, and the override that says so."""


def _values(text: str, full_key: Callable[[str], str]) -> Iterator[_Value]:
    override = _parsed(text)
    key, _, value = text.partition("=")
    if override is None or not override.is_sweep_override():
        yield key.lstrip("+~"), value, text
        return
    if override.value_type in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP):
        raise UserError(f"{text}: an interval or a glob is no list of values; write them with commas")
    name = key.lstrip("+")
    plus = key[: len(key) - len(name)]
    for each in override.sweep_string_iterator():
        yield full_key(name), each, f"{plus}{full_key(name)}={each}"


def _parsed(text: str) -> Override | None:
    """None for what is not in Hydra's grammar, such as a path with brackets: it is one value, whose key
    decides."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def _short(keys: Sequence[str]) -> Iterator[str]:
    """Of each key the last parts that tell it from the others."""
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        yield next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)


def _labels(values: Sequence[str]) -> dict[str, str]:
    """What each of a key's values is called in a folder's name: itself, but for characters that such a name
    should not have. The end of a long one, where a path's file is. What others would be called, too, and what
    is cut off, is told by a digest, which does not depend on the order."""
    plain = {value: re.sub(r"[^\w.+-]+", "_", value).strip("_") or "empty" for value in values}
    shared = Counter(plain.values())
    found = {}
    for value, name in plain.items():
        if shared[name] > 1 or len(name) > _LONGEST_VALUE:
            digest = hashlib.sha256(value.encode()).hexdigest()[:_DIGEST]
            name = f"{name[-(_LONGEST_VALUE - _DIGEST - 1) :].strip('_')}-{digest}"
        found[value] = name
    return found
