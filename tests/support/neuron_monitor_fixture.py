"""A program that stands for neuron-monitor."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Install = Callable[[str], Path]
FOREVER = "while True:\n    print(BUSY, flush=True)\n    time.sleep(0.02)"
SECONDS = 120.0
"""What a loaded machine may take."""


def report(*, cores: dict[str, float], memory: dict[str, dict[str, int]], **runtime: Any) -> dict[str, Any]:
    """One period of a process, in the shape that the user guide prints."""
    used = {
        "host": 2**30,
        "neuron_device": sum(sum(kinds.values()) for kinds in memory.values()),
        "usage_breakdown": {"host": {"tensors": 5}, "neuroncore_memory_usage": memory},
    }
    counters = {index: {"neuroncore_utilization": value, "flops": 10} for index, value in cores.items()}
    data = {
        "pid": 17,
        "neuron_runtime_tag": "367",
        "error": "",
        "report": {
            "neuroncore_counters": {"period": 5.0, "neuroncores_in_use": counters, "error": ""},
            "memory_used": {"period": 5.0, "neuron_runtime_used_bytes": used, "error": ""},
        },
    }
    return data | runtime


def node(*runtimes: dict[str, Any]) -> dict[str, Any]:
    return {
        "neuron_runtime_data": list(runtimes),
        "system_data": {
            "memory_info": {"period": 5.0, "memory_total_bytes": 2**36, "memory_used_bytes": 3 * 2**30},
            "vcpu_usage": {"average_usage": {"user": 32.77, "idle": 66.9}},
        },
        "instance_info": {"instance_type": "trn1.32xlarge"},
        "neuron_hardware_info": {
            "neuron_device_count": 16,
            "neuroncore_per_device_count": 2,
            "neuron_device_memory_size": 34359738368,
            "error": "",
        },
    }


BUSY = node(
    report(cores={"0": 87.5, "1": 12.5}, memory={"0": {"tensors": 2**33, "model_code": 2**30}, "1": {}})
)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a Python program on PATH as neuron-monitor; ``BUSY`` is a line that it may print."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(body: str) -> Path:
        program = folder / "neuron-monitor"
        head = f"#!{sys.executable}\nimport os, signal, subprocess, sys, time\n"
        program.write_text(f"{head}BUSY = {json.dumps(BUSY)!r}\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return program

    return write


def is_running(pid: int) -> bool:
    """Alive, or a zombie that nobody has reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def pid_in(file: Path) -> int:
    wait_for(lambda: file.exists() and file.read_text().strip())
    return int(file.read_text())
