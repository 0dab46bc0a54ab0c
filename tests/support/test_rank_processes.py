"""What a parallel test does with a rank that fails, and with one that a signal ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from rank_processes import RankCrash, run_parallel


def crash(rank: int, world: int, marker: Path, times: int) -> int:
    """Rank 1 ends by a signal in the first ``times`` runs."""
    if rank == 1:
        with marker.open("a") as file:
            file.write("run\n")
        if len(marker.read_text().splitlines()) <= times:
            os.kill(os.getpid(), signal.SIGSEGV)
    return rank


def fail(rank: int, world: int, marker: Path) -> None:
    with marker.open("a") as file:
        file.write("run\n")
    raise ValueError("no such thing")


def test_a_rank_that_a_signal_ended_is_started_once_more_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="rank 1 was ended by SIGSEGV; all ranks are started once more"):
        assert run_parallel(2, crash, tmp_path / "marker", 1) == [0, 1]


@pytest.mark.filterwarnings("ignore:rank 1 was ended")
def test_one_that_is_ended_again_fails(tmp_path: Path) -> None:
    with pytest.raises(RankCrash, match="rank 1 was ended by SIGSEGV"):
        run_parallel(2, crash, tmp_path / "marker", 2)


def test_an_exception_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such thing"):
        run_parallel(1, fail, tmp_path / "marker")
    assert (tmp_path / "marker").read_text() == "run\n"
