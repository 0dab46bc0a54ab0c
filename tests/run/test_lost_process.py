"""A process of a run that dies, or hangs: the others end in time, and say so in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launched_run import ENDLESS, PATIENCE, environment, launch, wait_for, worker
from parallel_fixture import Case, run_parallel
from training_fixture import Project

from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.ranks import Ranks
from nxdt_align.errors import UserError
from nxdt_align.run.preconditions import report_lost_ranks


def start(project: Project, rank: int, port: int, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """``port``: of a store of this process's, as torchrun's workers meet at a store of torchrun's."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-m", "nxdt_align", *project.arguments(*ENDLESS, *overrides)]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=environment(**ranks, **address), stdout=output, stderr=subprocess.STDOUT
        )


def test_the_other_process_is_killed(tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    # A port that is merely free now can be taken before the run opens it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    processes = [start(project, rank, store.port, logs[rank]) for rank in range(2)]
    try:
        wait_for("preflight: policy and reference agree", logs[0], processes)
        processes[1].kill()
        assert processes[0].wait(PATIENCE) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    errors = [line for line in logs[0].read_text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "another of the run's 2 processes has ended" in errors[0], errors
    assert re.search("onnection|Broken pipe", errors[0]) and "resume_if_exists" in errors[0]
    assert "Traceback" not in logs[0].read_text()


def wait_for_a_process_that_hangs(rank: int, world: int) -> str:
    # The ranks need not meet within the second that the collective has.
    group = dist.new_group()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    if rank == 1:
        return ""  # and waits at the end of the test, not in the collective
    try:
        with report_lost_ranks(world, 1 / 60):
            dist.all_reduce(torch.zeros(1), group=group)
    except UserError as error:
        return str(error)
    return "no error"


def test_the_other_process_hangs() -> None:
    told, _ = run_parallel(2, wait_for_a_process_that_hangs)
    assert told.startswith("another of the run's 2 processes has ended, or has not answered for ")
    assert "timeout_minutes (0.0166667): Timed out waiting 1000ms" in told


def patience_of_groups(rank: int, world: int) -> list[float]:
    """Seconds that each group's collectives wait, in 2 stages x 2 data-parallel x 2 tensor-parallel ranks."""
    spread, patience = Case(pipeline=2, data=2, tensor=2), timedelta(seconds=1234)
    groups = Groups.join(spread.parallel, spread.topology(rank), "cpu", tied_head=True, timeout=patience)
    saver = Ranks.apart(patience)
    handles = [groups.data.group, groups.tensor.group, groups.pipeline.group, groups.ends.group, saver.group]
    return [seconds_of(group) for group in handles]


def seconds_of(group: dist.ProcessGroup | None) -> float:
    assert group is not None
    waits: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return waits.total_seconds()


def test_every_group_waits_as_long_as_it_is_told() -> None:
    """torch gives a group 30 minutes, or 10 on nccl, whatever init_process_group was told."""
    assert run_parallel(8, patience_of_groups) == [[1234.0] * 5] * 8


def test_errors_of_other_kinds_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), report_lost_ranks(2, 30):
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="timed out"), report_lost_ranks(1, 30):
        raise RuntimeError("timed out")


@pytest.mark.full
def test_train_sh_ends_when_a_process_is_killed(repo: Path, tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    log = tmp_path / "log"
    launcher = launch(repo, project, log, *ENDLESS)
    try:
        wait_for("preflight: policy and reference agree", log, [launcher])
        os.kill(worker(tmp_path, rank=1), signal.SIGKILL)
        assert launcher.wait(PATIENCE) == 137
    finally:
        launcher.terminate()
        launcher.wait(PATIENCE)
    said = log.read_text()
    assert re.search(r"error: the process of rank 1 \(pid \d+\) has ended by Signal 9 \(SIGKILL\)", said)
    assert "Traceback" not in said
