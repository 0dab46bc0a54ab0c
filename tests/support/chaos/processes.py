"""The command line in processes of their own, each struck at a chosen moment.

A server that has imported everything forks them, so that one starts in a tenth of a second. A moment is the
n-th time that a process is about to change a file under a folder: Python's own audit events tell it, and
``os.fsync``. The same command on the same files passes through the same moments, without any clock.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rank_processes import CRASHES, PRELOAD

CONTEXT = multiprocessing.get_context("forkserver")
TIMEOUT = 300
"""Seconds; a command that takes longer is one that hangs. None here takes more than 20 on an idle machine."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ONE_PATH = {"os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "shutil.rmtree": 0, "os.rename": 1}
"""Audit events that change a folder, and which of their arguments says where."""
REMOVING = ("os.remove", "os.rmdir", "shutil.rmtree")
CHANGING = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d+)?|(?<=\.)[0-9a-f]{8}(?=\.)|[0-9a-f]{32}")
"""Parts of names that are others each time."""


@dataclass(frozen=True)
class Moment:
    """``what`` is about to be done to ``path``, under the folder that is watched, for the ``count``-th time
    (from 0). Dates and random parts of names are left out of ``path``."""

    what: str
    path: str
    count: int = 0

    def __str__(self) -> str:
        return f"{self.what} {self.path}" + (f" ({self.count + 1})" if self.count else "")


@dataclass(frozen=True)
class Strike:
    """What befalls a process at a moment.

    Args:
        how: a signal that the process gets, or the number of an error that the change fails with: after
            ENOSPC every later change that makes something fails too, as on a disk that stays full.
    """

    at: Moment
    how: signal.Signals | int


@dataclass(frozen=True)
class Command:
    """One process: what it runs, and what befalls it.

    Args:
        arguments: of the command line, after the program's name.
        below: the folder whose moments count.
        record: where to write its moments.
        largest_file: bytes; what ``ulimit -f`` sets.
    """

    arguments: Sequence[str]
    below: Path
    strike: Strike | None = None
    record: Path | None = None
    largest_file: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit status (minus the signal's number if one ended it; None if it hung), and
    all it said."""

    status: int | None
    said: str

    @property
    def error(self) -> str:
        """Its message."""
        lines = [line for line in self.said.splitlines() if line.startswith("error")]
        return lines[-1] if lines else self.said.strip().rpartition("\n")[2]

    @property
    def fault(self) -> str:
        """What no command may do; empty if it did none of it."""
        if self.status is None:
            return "hangs"
        if "Traceback (most recent call last)" in self.said:
            return "traceback"
        if self.status in CRASHES:
            return f"ended by {signal.Signals(-self.status).name}"
        if self.status > 0 and self.status < 128 and "error" not in self.said:
            return "failed without a word"
        return ""


class Running:
    """A command that runs."""

    def __init__(self, command: Command, output: Path) -> None:
        self._output = output
        self.process = CONTEXT.Process(
            target=_child, args=(command, str(output), list(sys.path)), daemon=True
        )
        self.process.start()

    def await_stop(self, timeout: float = 30) -> bool:
        """Wait until SIGSTOP has befallen it; False if it has ended instead, or waits for another process."""
        deadline = time.monotonic() + timeout
        while self.process.is_alive() and time.monotonic() < deadline:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "T":
                return True
            time.sleep(0.01)
        return False

    def go_on(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGCONT)

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            self.process.join()
        said = self._output.read_text(errors="replace") if self._output.exists() else ""
        return Ended(status, said)


def run(command: Command, folder: Path) -> Ended:
    return start(command, folder).wait()


def start(command: Command, folder: Path) -> Running:
    """``folder``: for what it says."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    return Running(command, _unused(folder, "output"))


def start_ranks(commands: Sequence[Command], folder: Path) -> list[Running]:
    """One command per rank of one run on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = str(len(commands))
    running = []
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        running.append(start(replace(command, environment=place | meeting), folder))
    return running


def moments(command: Command, folder: Path) -> tuple[Ended, list[Moment]]:
    """Runs it unharmed."""
    record = _unused(folder, "moments")
    ended = run(replace(command, record=record), folder)
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for line in record.read_text().splitlines():
        what, _, path = line.partition("\t")
        found.append(Moment(what, path, seen[what, path]))
        seen[what, path] += 1
    return ended, found


def _unused(folder: Path, stem: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        path = folder / f"{stem}-{number}.txt"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            continue
        return path


# Within the process


def _child(command: Command, output: str, path: list[str]) -> None:
    sys.path[:] = path
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(command.environment)
    if command.largest_file is not None:
        limits = (command.largest_file, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # The forkserver's processes ignore it; a command started by a shell does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _watch(_Watch(command))
    from nxdt_align.__main__ import main

    sys.argv = ["nxdt-align", *command.arguments]
    try:
        status = main()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


class _Watch:
    """Counts moments, and strikes."""

    def __init__(self, command: Command) -> None:
        self._below, self._strike = os.fspath(command.below) + os.sep, command.strike
        self._record = None if command.record is None else os.open(command.record, os.O_WRONLY | os.O_APPEND)
        self._count = 0
        self._is_full = False

    def see(self, what: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):  # an open descriptor
            return
        where = os.path.abspath(os.fsdecode(path))
        if not where.startswith(self._below) or "events.out.tfevents" in where:
            return  # a thread of TensorBoard's writes those, whenever it comes to it
        name = CHANGING.sub("*", where[len(self._below) :])
        if self._record is not None:
            os.write(self._record, f"{what}\t{name}\n".encode())
        if self._strike is None:
            return
        makes = what not in REMOVING
        if self._is_full and makes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        at, how = self._strike.at, self._strike.how
        if (what, name) == (at.what, at.path):
            number, self._count = self._count, self._count + 1
            if number != at.count:
                return
            if isinstance(how, signal.Signals):
                os.kill(os.getpid(), how)
            elif makes:
                self._is_full = how == errno.ENOSPC
                raise OSError(how, os.strerror(how), where)


def _watch(watch: _Watch) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags is not None and flags & WRITING:
                watch.see("open", path)
        elif event in ONE_PATH:
            watch.see(event, arguments[ONE_PATH[event]])

    flush: Callable[[int], None] = os.fsync

    def fsync(descriptor: int) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        watch.see("fsync", os.readlink(f"/proc/self/fd/{number}"))
        flush(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)
