"""The port at which the processes of one machine meet."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from nxdt_align.errors import UserError
from nxdt_align.run.workers import _with_port, take_port

TAKE = """
import sys
from nxdt_align.run.workers import take_port
print(take_port([int(port) for port in sys.argv[1:]]))
"""


def free_ports(count: int) -> list[int]:
    """Of this machine, at this moment."""
    held = [socket.create_server(("", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def test_runs_that_look_at_once_take_different_ports() -> None:
    """The first is open in another program, the second taken by this process, which has not opened it yet."""
    ports = free_ports(3)
    with socket.create_server(("", ports[0])):
        assert take_port(ports) == ports[1]
        other = subprocess.run(
            [sys.executable, "-c", TAKE, *map(str, ports)], capture_output=True, text=True, check=True
        )
        assert int(other.stdout) == ports[2]
        with pytest.raises(UserError, match=r"MASTER_PORT: none of .* is free"):
            take_port(ports[:2])


def test_torchruns_arguments_get_one_port_out_of_a_range() -> None:
    (port,) = free_ports(1)
    given = ["--nproc_per_node", "2", "--master_port", f"{port}-{port}", "-m", "nxdt_align", "train"]
    assert _with_port(given) == [*given[:3], str(port), *given[4:]]
    named = ["--master_port", "29500", "-m", "nxdt_align"]
    assert _with_port(named) == named
