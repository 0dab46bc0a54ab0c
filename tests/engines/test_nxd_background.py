"""Checkpoints of the NxD engine that are written while training goes on, on the real neuronx-distributed."""

from __future__ import annotations

import errno
import json
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_fixture import (
    Case,
    engine,
    held,
    optimizer_of,
    require_nxd,
    run_ranks,
    settings_of,
    snapshot,
    start,
    storage,
    train,
)

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.nxd.checkpoint import SUMMARY

pytestmark = pytest.mark.nxd
CASES = [Case(tp=2, dp=2, sp=True), Case(tp=2, pp=2, sp=True)]
PRECISIONS = ["fp32", "bf16"]
FAILING = 1
"""The rank whose disk is full."""


def resumed(case: Case, precision: str, folder: Path) -> Any:
    built = engine(case, **settings_of(precision))
    optimizer = optimizer_of(built)
    built.load(folder, None)
    extra = built.load(folder, optimizer)
    return extra, train(built, optimizer, 2), snapshot(built)


def both_ways(case: Case, precision: str, folder: str) -> Any:
    """The same state at once and in the background, where everything that was saved changes before
    anything is written; then two steps from each."""
    at_once, behind = Path(folder) / "at_once", Path(folder) / "behind"
    built = start(case, **settings_of(precision))
    optimizer = optimizer_of(built)
    train(built, optimizer, 2)
    extra = {"global_step": 2, "counts": torch.arange(3)}
    built.save(at_once, optimizer, extra)
    done: list[str] = []
    with held() as go:
        built.save(behind, optimizer, extra, background=True)
        built.once_saved(lambda: done.append("whole"))
        train(built, optimizer, 1)
        for _, parameter in built.named_parameters():
            parameter.detach().fill_(torch.nan)
        extra["counts"].zero_()
        meanwhile = list(done), behind.exists()
        go.set()
        built.finish_saving()
    built.once_saved(lambda: done.append("later"))
    seen = meanwhile, (list(done), behind.exists())
    return seen, resumed(case, precision, at_once), resumed(case, precision, behind)


def one_at_a_time(case: Case, folder: str) -> Any:
    """A second save waits for the first; what reads waits for it, too."""
    first, second = Path(folder) / "first", Path(folder) / "second"
    built = start(case)
    with held() as go:
        built.save(first, None, {"global_step": 1}, background=True)
        was_there = first.exists()
        threading.Timer(0.5, go.set).start()
        built.save(second, None, {"global_step": 2}, background=True)
        is_there = first.exists()
    extra = built.load(second, None)
    return was_there, is_there, extra


def told(act: Callable[[], None]) -> str:
    with pytest.raises(EngineError) as error:
        act()
    return str(error.value)


def full(real: Callable[..., None], *arguments: Any) -> None:
    if torch.distributed.get_rank() == FAILING:
        raise OSError(errno.ENOSPC, "No space left on device")
    real(*arguments)


@contextmanager
def small_files() -> Iterator[None]:
    """Inside, the system lets the failing rank write no file of more than 2 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == FAILING:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failures(case: Case, folder: str) -> Any:
    """What every rank is told, when, and what is left."""
    places = {name: Path(folder) / name for name in ("whole", "lost", "next", "late", "at_once", "after")}
    built = start(case)
    optimizer = optimizer_of(built)
    built.save(places["whole"], optimizer, {"global_step": 1}, background=True)
    built.finish_saving()
    done: list[str] = []
    found = {}
    with storage(full):
        built.save(places["lost"], optimizer, {}, background=True)
        built.once_saved(lambda: done.append("lost"))
        found["next"] = told(lambda: built.save(places["next"], optimizer, {}, background=True))
    with small_files():
        built.save(places["late"], optimizer, {}, background=True)
        found["late"] = told(built.finish_saving)
        found["at_once"] = told(lambda: built.save(places["at_once"], optimizer, {}))
    built.finish_saving()
    built.save(places["after"], optimizer, {"global_step": 5}, background=True)
    built.finish_saving()
    built.barrier()
    return found, done, sorted(f.name for f in Path(folder).iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("background")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[Any, Any]:
    require_nxd()
    for name in ("order", "failures"):
        (folder / name).mkdir()
    jobs: dict[Any, Any] = {
        (case, precision): (both_ways, (case, precision, str(folder / f"{index}{precision}")))
        for index, case in enumerate(CASES)
        for precision in PRECISIONS
    }
    jobs["order"] = one_at_a_time, (CASES[0], str(folder / "order"))
    jobs["failures"] = failures, (CASES[0], str(folder / "failures"))
    return dict(zip(jobs, run_ranks(4, list(jobs.values()), folder / "ranks"), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_holds_the_values_of_its_moment(results: Any, folder: Path, case: Case, precision: str) -> None:
    for seen, (extra, losses, final), (same_extra, same_losses, same) in results[case, precision]:
        assert seen == (([], False), (["whole", "later"], True))
        assert extra["global_step"] == same_extra["global_step"] == 2
        assert torch.equal(same_extra["counts"], torch.arange(3))
        assert losses == same_losses and not any(loss.isnan() for loss in losses)
        assert set(final) == set(same)
        for name, tensor in final.items():
            assert torch.equal(tensor, same[name]), name
    place = folder / f"{CASES.index(case)}{precision}"
    assert sorted(f.name for f in place.iterdir()) == ["at_once", "behind"], "leftovers"
    at_once, behind = (json.loads((place / f / SUMMARY.name).read_text()) for f in ("at_once", "behind"))
    assert at_once == behind and "done" in behind["files"]


def test_at_most_one_is_under_way(results: Any) -> None:
    for was_there, is_there, extra in results["order"]:
        assert (was_there, is_there) == (False, True)
        assert extra["global_step"] == 2


def test_every_rank_is_told_once_and_the_next_one_is_whole(results: Any, folder: Path) -> None:
    found, done, left = results["failures"][0]
    assert all(rank == results["failures"][0] for rank in results["failures"])
    assert f"cannot write checkpoint {folder}/failures/lost: the disk is full" in found["next"]
    for name in ("late", "at_once"):
        assert f"cannot write checkpoint {folder}/failures/{name}: torch could not write " in found[name]
        assert "is the disk full, or a quota used up?" in found[name]
    behind = "(it was being written in the background)"
    assert behind in found["next"] and behind in found["late"] and behind not in found["at_once"]
    assert not any("\n" in text for text in found.values())
    assert done == [] and left == ["after", "whole"]
