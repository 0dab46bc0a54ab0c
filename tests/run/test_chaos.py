"""The short form of ``make chaos``: kills, signals, damage and races at named moments.

And that the harness sees faults where there are some.
"""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import cases
from chaos.cases import DAMAGE, NAMED, Case, Truths, named
from chaos.processes import Ended
from chaos.trial import ALONE, ASYNC, TWO, Kind
from matrix import but_for


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Truths:
    return Truths(tmp_path_factory.mktemp("truth"))


def befalls(befall: Any, folder: Path) -> None:
    outcome = Case("", "", befall).run(folder / "case")
    assert not outcome.fault, outcome.fault


def in_words(value: object) -> str:
    return value.name if isinstance(value, (Kind, signal.Signals)) else str(value)


USUAL = ("before the run has a folder", "first checkpoint, half", "export, whole, without its name")
assert set(USUAL) <= set(NAMED)
KILLS = [
    *(pytest.param(ALONE, 0, name, marks=() if name in USUAL else pytest.mark.full) for name in NAMED),
    (ASYNC, 0, "second checkpoint, whole, without its name"),
    (TWO, 0, "first checkpoint, half"),
    pytest.param(TWO, 1, "reference pass, between two parts", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("kind", "rank", "name"), KILLS, ids=in_words)
def test_killed(truths: Truths, tmp_path: Path, kind: Kind, rank: int, name: str) -> None:
    """The next start ends with the weights, the export and the curves of a run that nothing befell, and
    removes what the killed one left half."""
    moment = named(truths.moments(), NAMED[name])
    befalls(cases.strike(truths, kind, moment, signal.SIGKILL, rank), tmp_path)


def test_a_full_disk(truths: Truths, tmp_path: Path) -> None:
    moment = named(truths.moments(), NAMED["second checkpoint, whole, without its name"])
    befalls(cases.fill(truths, ALONE, moment, None), tmp_path)


@pytest.mark.parametrize("how", but_for(["a bit flipped", "cut"], DAMAGE))
def test_a_damaged_checkpoint(truths: Truths, tmp_path: Path, how: str) -> None:
    """The tensors of the newest one."""
    befalls(cases.damage(truths, "*step=4*/tensors/*.distcp", how, 0), tmp_path)


def test_two_new_runs_at_once(tmp_path: Path) -> None:
    befalls(cases.two_new_runs("seed=8"), tmp_path)


def test_two_resumes_at_once(truths: Truths, tmp_path: Path) -> None:
    befalls(cases.two_resumes(truths), tmp_path)


# The harness itself


def test_another_result_is_seen(truths: Truths) -> None:
    whole = truths.result(ALONE)
    assert whole.difference(whole) == ""
    name, weight = next(iter(whole.weights.items()))
    other = weight.clone().view(-1)
    other[0] = torch.nextafter(other[0], torch.tensor(9.0))
    less = {n: w for n, w in whole.weights.items() if n != name}
    for weights in (less, {**less, name: other.view_as(weight)}):
        assert dataclasses.replace(whole, weights=weights).difference(whole) == "other weights"
    assert dataclasses.replace(whole, export={}).difference(whole) == "another export"
    tag, points = next(iter(whole.curves.items()))
    moved = {**whole.curves, tag: {step: value + 1e-3 for step, value in points.items()}}
    assert dataclasses.replace(whole, curves=moved).difference(whole) == f"another curve of {tag}"


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0, ""), ""),
        (Ended(1, "error: seq_length: must be positive"), ""),
        (Ended(None, ""), "hangs"),
        (Ended(1, "Traceback (most recent call last):\n  ..."), "traceback"),
        (Ended(1, "Killed"), "failed without a word"),
        (Ended(-signal.SIGSEGV, ""), "ended by SIGSEGV"),
    ],
)
def test_what_no_command_may_do(ended: Ended, fault: str) -> None:
    assert ended.fault == fault
