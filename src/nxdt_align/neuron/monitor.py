"""Runs neuron-monitor beside a run: keeps its newest report and logs each of its warnings once.

The run never depends on the program: a separate thread reads it, and it ends with the run.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress

from nxdt_align.neuron.report import Report, parse

log = logging.getLogger(__name__)
PROGRAM = "neuron-monitor"
MAX_AGE = 60.0
"""Seconds after which a report is out of date. The program reports every 5."""
_LONGEST_LINE = 2**24
_GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL."""
_MOST_WARNINGS = 20


class NeuronMonitor:
    """Starts ``program`` in a new process group and reads it until ``stop``.

    Args:
        program: looked for on PATH.
        max_age: seconds for which a report counts as new.
    """

    def __init__(self, program: str = PROGRAM, max_age: float = MAX_AGE) -> None:
        self._program = program
        self._max_age = max_age
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._ending = threading.Lock()
        self._stopping = False
        self._newest: tuple[float, Report] | None = None
        self._said: set[str] = set()

    def start(self) -> bool:
        """Start the program; returns whether it runs."""
        path = shutil.which(self._program)
        if path is None or self._process is not None:
            return self._process is not None
        try:
            self._process = subprocess.Popen(
                [path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self._warn(f"{path} does not start, so device values are not logged: {error}")
            return False
        self._stopping = False
        self._thread = threading.Thread(
            target=self._read, args=(self._process,), name=self._program, daemon=True
        )
        self._thread.start()
        # If the run is killed, the pipe closes and the program ends at its next report.
        atexit.register(self.stop)
        return True

    def newest(self) -> Report | None:
        """The last report, if it is not out of date."""
        newest = self._newest
        if newest is None or time.monotonic() - newest[0] > self._max_age:
            return None
        return newest[1]

    def stop(self) -> None:
        """End the program and everything that it started; may be called more than once."""
        self._stopping = True
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        self._end(process)
        if self._thread is not None:
            self._thread.join(_GRACE)
        self._newest = None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the process group, then reap its leader: until then its pid cannot be reused as a group id."""
        with self._ending:
            if process.returncode is not None:
                return
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
                # Not reaped here: a group whose leader is gone may still have members to kill.
                if number == signal.SIGTERM:
                    _wait_for_exit(process.pid, _GRACE)
            process.wait()

    # The reading thread

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            while line := lines.readline(_LONGEST_LINE):
                self._take(line)
        self._newest = None
        stopped = self._stopping
        self._end(process)
        if not stopped:
            self._warn(f"{self._program} has ended, so device values are no longer logged")

    def _take(self, line: bytes) -> None:
        try:
            report = parse(line)
        except ValueError as error:
            self._warn(f"{self._program} printed a line that is not a report; skipped: {error}")
            return
        self._newest = (time.monotonic(), report)
        for text in report.errors:
            self._warn(f"{self._program} reports: {text}")

    def _warn(self, text: str) -> None:
        """Log each warning once, ignoring numbers in it."""
        kind = re.sub(r"\d+", "#", text)
        if kind not in self._said and len(self._said) < _MOST_WARNINGS:
            self._said.add(kind)
            log.warning("%s", text)


def _wait_for_exit(pid: int, seconds: float) -> None:
    """Wait up to ``seconds`` for the child ``pid`` to end, without reaping it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(ChildProcessError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.01)
                continue
        return
