"""The end of a run's process group."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from nxdt_align.run.processes import end_processes


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_group_is_left_with_its_threads(tmp_path: Path) -> None:
    before = loops()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    # A thread takes its name only after it was started, and is listed for a moment after its end.
    wait_for(lambda: loops() - before, "gloo has started no thread")
    started = loops() - before
    end_processes()
    assert not dist.is_initialized()
    wait_for(lambda: not started & loops(), "gloo's thread goes on")


def test_without_a_group_nothing_happens() -> None:
    end_processes()
    assert not dist.is_initialized()


def loops() -> set[str]:
    """The numbers of gloo's threads in this process."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it has ended since
            continue
        if name == "pt_gloo_runloop":
            found.add(task.name)
    return found
