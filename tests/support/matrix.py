"""A matrix of cases of which ``make test`` runs a few, that cover each value of each side once, and
``make test-full`` all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def but_for(usual: Collection[str], names: Iterable[str]) -> list[Any]:
    """``names`` as parameters, all marked ``full`` but the usual ones."""
    names = list(names)
    assert set(usual) <= set(names), set(usual) - set(names)
    return [pytest.param(name, marks=() if name in usual else pytest.mark.full) for name in names]


def seeds(count: int, *, usual: int) -> list[Any]:
    """That many seeds of random cases as parameters, all but the first marked ``full``."""
    return [pytest.param(seed, marks=() if seed < usual else pytest.mark.full) for seed in range(count)]


def asked(request: pytest.FixtureRequest, cases: Mapping[str, T]) -> dict[str, T]:
    """Those that the tests of this file are called with (as ``name``) in this session, for a fixture that
    computes all at once."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = {item.callspec.params.get("name") for item in here}
    return {name: case for name, case in cases.items() if name in names}
