"""A checkpoint that is written while training goes on; the same on every engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from nxdt_align.engines.checkpoint_folder import CheckpointError
from nxdt_align.engines.ranks import Ranks


class AsyncSave:
    """A write on a thread of its own, and what is to be done when it is whole."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._actions: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._is_whole = False
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._written = thread.submit(self._run, write)
        thread.shutdown(wait=False)

    def _run(self, write: Callable[[], None]) -> None:
        write()
        with self._lock:
            self._is_whole = True
            for action in self._actions:
                action()

    def then(self, action: Callable[[], None]) -> None:
        """Do ``action`` once the checkpoint is whole, now if it is; never, if it fails."""
        with self._lock:
            if not self._is_whole:
                self._actions.append(action)
                return
        action()

    def wait(self) -> None:
        """Raises CheckpointError where ``write`` did."""
        try:
            self._written.result()
        except CheckpointError as error:
            raise CheckpointError(f"{error} (it was being written in the background)") from error


class AsyncSaver:
    """Writes checkpoints, at most one at a time, on a thread where asked; an engine says what and how.

    Args:
        timeout: how long a rank waits for the others; torch's default where None.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self._ranks: Ranks | None = None
        self._running: AsyncSave | None = None

    def ranks(self) -> Ranks:
        """All ranks in a group of their own over the CPU, since a thread talks while training does; the
        first call is a collective."""
        if self._ranks is None:
            self._ranks = Ranks.apart(self._timeout)
        return self._ranks

    def finish(self) -> None:
        """Wait for the save in the background, if there is one. Raises CheckpointError where it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.wait()

    def then(self, action: Callable[[], None]) -> None:
        """Do ``action`` once the save in the background is whole, or now if there is none; never, if that
        save fails."""
        if self._running is None:
            action()
        else:
            self._running.then(action)

    def _write(self, write: Callable[[], None], *, background: bool) -> None:
        """``write``, now or on a thread. What fails on the thread is raised by the next ``finish``."""
        if background:
            self._running = AsyncSave(write)
        else:
            write()
