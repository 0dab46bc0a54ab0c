"""The end of a run's process group."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from nxdt_align.build.parts import end_processes


def test_a_group_is_left_with_its_threads(tmp_path: Path) -> None:
    before = loops()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    named = time.monotonic() + 60  # a thread takes its name only after it was started
    while loops() == before:
        assert time.monotonic() < named, "gloo has started no thread"
        time.sleep(0.01)
    end_processes()
    assert not dist.is_initialized()
    assert loops() == before


def test_without_a_group_nothing_happens() -> None:
    end_processes()
    assert not dist.is_initialized()


def loops() -> int:
    """gloo's threads in this process."""
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("pt_gloo_runloop")
