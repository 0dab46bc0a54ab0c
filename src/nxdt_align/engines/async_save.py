"""A checkpoint that is written while training goes on; the same on every engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from nxdt_align.engines.checkpoint_folder import CheckpointError


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
    """Keeps at most one checkpoint in the making; what an engine's saver offers to those who wait for it."""

    def __init__(self) -> None:
        self._running: AsyncSave | None = None

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
