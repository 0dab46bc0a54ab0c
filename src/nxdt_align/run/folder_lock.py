"""One process tree per run's folder: who has claimed it, and what killed ones have left in it.

The lock is the kernel's (flock), on a file in the folder, held by the run's first process: it goes with the
process, however that ends. It holds between nodes on NFS (version 4, or 3 with lockd) and on Lustre that is
mounted with ``flock``, as FSx for Lustre's documentation says to. On a file system without locks the file
says which process has the folder, and that is looked for on its own node; a second run on another node cannot
be noticed there, and is warned of.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nxdt_align.config.start import CHECKPOINTS
from nxdt_align.errors import UserError
from nxdt_align.files import clear_unfinished, close_unforked, lock, open_unforked, unfinished

log = logging.getLogger(__name__)

LOCK = Path(".running") / "lock"
"""In a folder of its own: NeMo's exp_manager moves the files beside checkpoints/ when a run goes on."""
DATE_FORMAT = "%Y-%m-%d_%H-%M-%S"


class FolderInUseError(UserError):
    """Another run holds the folder."""


class FolderLock:
    """Holds a run's folder, which it makes where there is none. A context.

    Args:
        advice: what to do if another run holds it, as the end of the message.
        made: folders that the caller has made for this run, the innermost first.

    Raises FolderInUseError, and changes nothing then; OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, advice: str = "", *, made: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._made = list(made) or _missing(folder)
        path = folder / LOCK
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = open_unforked(path, os.O_RDWR | os.O_CREAT)
        try:
            self._take(advice)
        except BaseException:
            close_unforked(self._descriptor)
            raise

    def _take(self, advice: str) -> None:
        taken, holder = lock(self._descriptor), self._holder()
        is_held = taken is False
        if taken is None and holder is not None:
            is_here = holder["host"] == socket.gethostname()
            is_held = is_here and _runs(int(holder["pid"]), str(holder["started"]))
            if not is_here:
                log.warning(
                    "the file system of %s has no locks; whether a process on %s still runs there is unknown",
                    *(self.folder, holder["host"]),
                )
        if is_held:
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise FolderInUseError(f"{self.folder} is in use: {who} runs in it. {advice}")
        self.is_sure = taken is True
        """Whether no other process can hold it."""
        own = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._write(json.dumps(own))

    def clear(self) -> None:
        """Remove what killed saves have left, whatever its age."""
        if self.is_sure:
            for place in _places(self.folder):
                clear_unfinished(place)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go. New folders that nothing was written into go, too."""
        with suppress(OSError):
            self._write("")
            if self._made and [entry.name for entry in self.folder.iterdir()] == [LOCK.parent.name]:
                shutil.rmtree(self.folder / LOCK.parent)
                for folder in self._made:
                    folder.rmdir()
        close_unforked(self._descriptor)

    def _holder(self) -> dict[str, str | int] | None:
        """Who wrote last; None for nobody, or for what cannot be read."""
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0))
            return {"host": str(found["host"]), "pid": int(found["pid"]), "started": str(found["started"])}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def _write(self, text: str) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


def claim_dated(parent: Path) -> FolderLock:
    """A new dated folder that no other run has, whenever it starts."""
    stamp = time.strftime(DATE_FORMAT)
    folder, count = parent / stamp, 1
    while True:
        made = [folder, *_missing(parent)]
        parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            count += 1
            folder = parent / f"{stamp}-{count}"
        except FileNotFoundError:
            """Another run that stopped early has removed the parent that it had made."""
        else:
            return FolderLock(folder, made=made)


def clear_if_free(folder: Path) -> bool:
    """As ``FolderLock.clear``, if there is something to remove and no run holds ``folder``; whether so."""
    if not any(unfinished(place) for place in _places(folder)):
        return False
    try:
        with FolderLock(folder) as held:
            held.clear()
    except FolderInUseError:
        return False
    return True


def _missing(folder: Path) -> list[Path]:
    """Of it and its parents, the innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def _places(folder: Path) -> tuple[Path, ...]:
    """Where a run writes."""
    return folder, folder / CHECKPOINTS


def _runs(pid: int, started: str) -> bool:
    """Whether the process of this node that had this number then still runs, and not another one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        """There is one, another user's."""
    return _started(pid) == started


def _started(pid: int) -> str:
    """When a process of this node began, in the kernel's ticks; empty where that is unknown."""
    try:
        # The name, in brackets, may hold spaces; the 22nd field of proc(5) is the 20th after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
