"""SIGTERM, SIGINT and SIGUSR1 of a training process: when each counts, and the exit status.

Imports only the standard library, so that a process can handle them before its slow imports.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import weakref
from types import FrameType, TracebackType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
UNHEARD_SECONDS = 10.0
"""After which a process with nothing to save ends, though it waits in native code and cannot be interrupted
otherwise."""


class Stopped(SystemExit):
    """A signal has ended the run; the exit status is 128 + its number.

    Args:
        number: the signal's.
        situation: where the run stands, for the user.
        is_saved: whether there is a checkpoint of its last step.
        together: whether all ranks end by it, at the same place.
    """

    def __init__(
        self, number: int, situation: str, *, is_saved: bool = False, together: bool = False
    ) -> None:
        super().__init__(status(number))
        self.situation, self.is_saved, self.together = situation, is_saved, together
        self._name: str | None = signal.Signals(number).name

    def tell(self, *more: str) -> None:
        """Print what has come and what has become of the run, and ``more``; once."""
        name, self._name = self._name, None
        if name is not None:
            print(f"{name}: {self.situation}", *more, sep="\n", file=sys.stderr, flush=True)


def status(number: int) -> int:
    return 128 + number


class StopSignals:
    """Handles the three signals from ``install`` (or entering it as a context) until ``uninstall``.

    Until ``hold``, and again after ``release``, a signal raises ``Stopped`` in the main thread: there is
    nothing to finish. In between it only sets ``received``, which training asks for after each step. A
    second one ends the process at once.

    Args:
        speaks: whether this process says that it has received one: one process does for all.
        repeats: seconds within which another signal counts as the same one. A launcher hands on what the
            system may have sent to every process already. Infinite where a launcher ends its processes.
    """

    def __init__(self, *, speaks: bool = True, repeats: float = 0.2) -> None:
        self.received: int | None = None
        """The first signal's number."""
        self.situation = "stopped before the first step: there is nothing to save yet"
        self.is_saved = False
        """Both are ``Stopped``'s, where a signal raises that."""
        self._speaks, self._repeats = speaks, repeats
        self._holds = self._is_ending = False
        self._heard = threading.Event()
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    # Handlers

    @property
    def is_installed(self) -> bool:
        return self._pipe is not None

    def install(self) -> bool:
        """Whether this could be done: only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return False
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        # C code that waits, for another rank or a device, keeps Python's handlers waiting as well; what the
        # interpreter writes here reaches a thread at once.
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        _in_this_process.add(self)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
        return True

    def uninstall(self) -> None:
        """Restore the handlers that there were."""
        if self._pipe is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        _in_this_process.discard(self)
        os.close(self._pipe[1])  # ends the thread, which closes the other end
        self._pipe = None

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()

    # When they count

    def hold(self) -> None:
        """From now on a signal waits until ``received`` is looked at, or for ``release``."""
        if not self._holds:
            self._holds = True
            if self.received is not None:
                self.release()

    def release(self) -> None:
        """From now on a signal raises ``Stopped``; now, where one has come."""
        self._holds = False
        if self.received is not None:
            self._raise()

    def ending(self) -> None:
        """The process is about to end by a signal: no further one matters."""
        self._is_ending = True

    def _raise(self) -> NoReturn:
        assert self.received is not None
        self._heard.set()
        raise Stopped(self.received, self.situation, is_saved=self.is_saved)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if not self._holds and not self._heard.is_set():
            self._raise()

    # The thread

    def _watch(self, pipe: int) -> None:
        first: tuple[int, float] | None = None
        try:
            while True:
                waits_for_main = first is not None and not self._holds and not self._heard.is_set()
                ready, _, _ = select.select([pipe], [], [], 0.5 if waits_for_main else None)
                now = time.monotonic()
                arrived = os.read(pipe, 64) if ready else None
                if arrived == b"":
                    return
                for number in arrived or b"":
                    if number not in SIGNALS:
                        continue
                    if first is None:
                        first = (number, now)
                        self.received = self.received or number
                        self._say_received(number)
                    elif number != first[0] or now - first[1] >= self._repeats:
                        self._end_now(number, "received again")
                if waits_for_main and first is not None and now - first[1] >= UNHEARD_SECONDS:
                    self._end_now(first[0], "ended without waiting for native code")
        finally:
            os.close(pipe)

    def _say_received(self, number: int) -> None:
        if self._speaks and self._holds:
            name = signal.Signals(number).name
            _say(f"{name}: finishing the step and writing a checkpoint; a second signal ends at once")

    def _end_now(self, number: int, why: str) -> None:
        if self._is_ending or self._repeats == float("inf"):
            return
        _say(f"{signal.Signals(number).name}: {why}; what was not saved is lost")
        os._exit(status(number))


def _say(text: str) -> None:
    """Not by a stream's ``write``, whose lock the main thread may hold."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"{text}\n".encode())


_in_this_process: weakref.WeakSet[StopSignals] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked process, e.g. one that loads data, shares the pipe: a signal to it must not count here. It
    ends with its parent, so that a Ctrl-C, which reaches both, is the parent's to answer."""
    for signals in list(_in_this_process):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        _in_this_process.discard(signals)


os.register_at_fork(after_in_child=_forget_in_child)
