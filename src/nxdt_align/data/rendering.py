"""Limits on the time and memory of a chat template, which is a program that came with the tokenizer."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SECONDS = 10.0
"""Processor time for the conversations of one record; ordinary ones take less than a millisecond."""
MEMORY = 2**30
"""Bytes that the process may grow by while a template works."""
LONGEST_TEXT = 32_000_000
"""Characters that a template may write for one conversation."""
_TICK = 0.5


class OutOfTime(BaseException):
    """A template took ``SECONDS``. No Exception, so that nothing between the loop and us takes it for a
    fault of its own: Jinja evaluates constants under ``except Exception``."""


class Limits:
    """Limits for the time between ``start`` and ``stop``, within ``applied``.

    Time ends the rendering with OutOfTime. It is kept with SIGALRM, so only in a process's main thread, where
    training tokenizes. Memory ends it with MemoryError: the soft limit of the address space, which counts for
    every thread of the process, is lowered meanwhile (Linux; elsewhere there is none).
    """

    def __init__(self) -> None:
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.thread_time()

    def stop(self) -> None:
        self._started = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        with self._timer(), limited_memory():
            yield

    @contextmanager
    def _timer(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return
        begun = time.monotonic()
        handler = signal.signal(signal.SIGALRM, self._look)
        left, interval = signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
        try:
            yield
        finally:
            self.stop()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
            if left:  # Another's timer goes on where it was.
                remaining = max(left - (time.monotonic() - begun), 1e-3)
                signal.setitimer(signal.ITIMER_REAL, remaining, interval)

    def _look(self, number: int, frame: FrameType | None) -> None:
        # The thread's own processor time: neither a machine under load nor other threads use it up.
        if self._started is not None and time.thread_time() - self._started > SECONDS:
            raise OutOfTime


@contextmanager
def limited_memory() -> Iterator[None]:
    """The process may grow by ``MEMORY``; more is a MemoryError."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + MEMORY
    set_here = soft == resource.RLIM_INFINITY or wanted < soft
    if set_here:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        if set_here:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
