"""What a run says: notices and warnings on the terminal, all the rest in a file of the run's folder."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType

from nxdt_align.redaction import redact

NOTICE = 25
"""Level of a message that the terminal shows. Info goes to the run's file alone."""
logging.addLevelName(NOTICE, "NOTICE")

LOG_FILE = "run.log"
_HEARD = ("nxdt_align", "lightning.pytorch", "lightning.fabric")
"""Loggers whose messages a run's file holds."""
_KEPT = 10_000
"""Messages kept until the run has a folder; more than one ever logs by then."""


class Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, each message on lines of its own: above a progress bar that is there."""

    def format(self, record: logging.LogRecord) -> str:
        said = super().format(record)
        return redact(said if record.levelno == NOTICE else f"{record.levelname}: {said}")

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):  # a terminal that is gone, or closed
            self.handleError(record)


def show_on_terminal(rank: int, level: int = NOTICE) -> None:
    """Rank 0's messages from ``level`` on, and every rank's warnings."""
    logger = logging.getLogger("nxdt_align")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # Lightning or NeMo may configure the root logger: propagating as well would print each line twice.
    logger.propagate = bool(logging.getLogger().handlers)
    if not logger.handlers:
        logger.addHandler(Terminal())
    for handler in logger.handlers:
        if isinstance(handler, Terminal):  # that of an earlier command of this process, too
            handler.setLevel(level)


class RunLog:
    """Everything that this package and Lightning log while it is open, in the run's folder once it has one.

    A context, around a run. Lightning's own messages stay off the terminal, but for its warnings.

    Args:
        keeps: whether there is a file; of rank 0 alone.
    """

    def __init__(self, *, keeps: bool) -> None:
        self._memory = MemoryHandler(_KEPT, flushLevel=logging.CRITICAL + 1)
        self._loggers = [logging.getLogger(name) for name in _HEARD]
        self._keeps = keeps

    def __enter__(self) -> RunLog:
        for logger in self._loggers:
            for handler in logger.handlers:
                if logger.name != "nxdt_align" and type(handler) is logging.StreamHandler:
                    handler.setLevel(logging.WARNING)
            if self._keeps:
                logger.addHandler(self._memory)
        return self

    def write_to(self, folder: Path) -> None:
        """What was said so far, and from now on. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._memory.setTarget(_File(folder / LOG_FILE, encoding="utf-8"))
        self._memory.flush()
        self._memory.capacity = 1  # from now on each message is written at once

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file = self._memory.target
        if file is not None:
            if error is not None:
                text = f"stopped: {str(error) or type(error).__name__}"
                file.handle(logging.LogRecord("nxdt_align", logging.ERROR, "", 0, text, (), None))
            file.close()
        for logger in self._loggers:
            logger.removeHandler(self._memory)
        self._memory.setTarget(None)
        self._memory.close()


class _File(logging.FileHandler):
    """Ends with one line where it cannot be written, as on a full disk: a run does not need it."""

    def __init__(self, path: Path, encoding: str) -> None:
        super().__init__(path, encoding=encoding)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        self._failed = False

    def handle(self, record: logging.LogRecord) -> bool:
        return False if self._failed else super().handle(record)

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))

    def close(self) -> None:
        with suppress(OSError):  # what could not be written is still to be flushed
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        self._failed = True
        print(f"WARNING: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
