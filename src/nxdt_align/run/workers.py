"""The processes of a run on this node: torchrun's, with our answer to signals and no traceback."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from nxdt_align.errors import UserError
from nxdt_align.stop_signals import status

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
PORT = "--master_port"
_taken: list[socket.socket] = []
REPEATS = 1.0
"""Seconds within which another signal counts as the same: it may come from the system, which sends it to
every process of a job, and from train.sh."""


def launch_workers(arguments: Sequence[str], *, debug: bool = False) -> int:
    """Run torchrun with its ``arguments``; returns the exit status.

    A range of ports after ``--master_port`` stands for the first that is free (``take_port``).

    ``debug``: show the traceback of what torchrun itself raises.

    A signal goes to every worker, which ends when its step is saved, however long that takes: torchrun itself
    would kill it after 30 seconds. A second one kills them. The status is then 128 + the signal's number, and
    otherwise that of the first worker that failed.
    """
    arguments = _with_port(arguments)
    launcher = _Launcher(debug)
    for number in HANDED_ON:
        signal.signal(number, launcher.hand_on)
    # On a thread torchrun leaves the handlers alone.
    thread = threading.Thread(target=launcher.run, args=(list(arguments),), name="torchrun")
    thread.start()
    thread.join()
    return launcher.status


def _with_port(arguments: Sequence[str]) -> list[str]:
    """torchrun's ``arguments`` with a port of its own in the place of a range of them."""
    given = list(arguments)
    if PORT in given:
        at = given.index(PORT) + 1
        first, _, last = given[at].partition("-")
        if first.isdecimal() and last.isdecimal():
            given[at] = str(take_port(range(int(first), int(last) + 1)))
    return given


def take_port(ports: Sequence[int]) -> int:
    """The first of ``ports`` that is free on this machine, and that no other run has taken since it looked.

    Raises UserError where there is none.
    """
    for port in ports:
        # A name that one process at a time has, until it ends: the port itself is torchrun's to open.
        name = socket.socket(socket.AF_UNIX)
        try:
            if sys.platform == "linux":  # others have no such names, only the look at the port itself
                name.bind(f"\0nxdt-align rendezvous {port}")
            with socket.create_server(("", port)):
                pass
        except OSError:
            name.close()
        else:
            _taken.append(name)
            return port
    raise UserError(
        f"MASTER_PORT: none of {ports[0]} to {ports[-1]} is free, where the processes of this run would "
        "meet; set it to a port that is"
    )


class _Launcher:
    def __init__(self, debug: bool) -> None:
        self.status, self._debug = 0, debug
        self._received: tuple[int, float] | None = None

    def run(self, arguments: list[str]) -> None:
        _silence_torchrun()
        try:
            torchrun.run(torchrun.parse_args(arguments))  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            self.status = self._status_of(error.failures)
        except SystemExit as error:  # torchrun's own usage
            self.status = error.code if isinstance(error.code, int) else 1
        except Exception as error:
            print(f"error: torchrun: {' '.join(str(error).split())}", file=sys.stderr)
            self.status = 1
            if self._debug:
                raise
        if self._received is not None:
            self.status = status(self._received[0])

    def hand_on(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self._received
        if first is not None and number == first[0] and now - first[1] < REPEATS:
            return
        if first is None:
            self._received = (number, now)
        found = list(children())
        for child in found:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(child, number if first is None else signal.SIGKILL)
        if not found or first is not None:
            os._exit(status(number))

    def _status_of(self, failures: Mapping[int, ProcessFailure]) -> int:
        rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
        code = failure.exitcode
        by_signal = self._received is not None or code in map(status, HANDED_ON)
        if not by_signal:
            how = f"with status {code}" if code > 0 else f"by Signal {-code} ({signal.Signals(-code).name})"
            print(f"error: the process of rank {rank} (pid {failure.pid}) has ended {how}", file=sys.stderr)
        return code if code > 0 else status(-code)


def children() -> Iterator[int]:
    """The processes that this one has started."""
    own = os.getpid()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # "pid (name) state parent ...", where the name may hold anything.
            parent = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        if int(parent) == own:
            yield int(process.name)


def _silence_torchrun() -> None:
    """Its warnings and errors tell, in many lines, what ``_status_of`` does in one."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
