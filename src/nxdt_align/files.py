"""Atomic writes: after a crash, a kill or a full disk, a file or folder is either complete or unchanged.

``atomic_write`` and ``atomic_folder`` drop unfinished work on interruption; code that keeps it and resumes,
such as a conversion, calls only their last step, ``publish_folder``.

Data goes to a temporary sibling (same file system), is flushed to the device, and gets its final name in one
rename. The next write into the same folder removes the temporary of a killed process; a lock, which the
kernel releases with the process, tells it from one that is still being written. Who knows that nobody else
writes there calls ``clear_unfinished``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # pragma: no cover - not a POSIX system: leftovers then stay
    fcntl = None  # type: ignore[assignment]

TEMPORARY_SUFFIX = ".nxdt-tmp"
"""Suffix of every unfinished file or folder; such names start with a dot."""
DOOMED_PREFIX = ".removing-"
"""Of a folder's name while it is being removed."""
_OLD_SUFFIX = ".nxdt-old"
"""Of what a new file or folder replaces, on a file system that cannot swap two names in one step."""
_LEFTOVER_AGE = 60.0
"""Seconds; a younger temporary may belong to a writer that has not locked it yet."""

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space, or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another folder",
    errno.EFBIG: "a file is larger than this file system or this process's limit (ulimit -f) allows",
    errno.EACCES: "permission denied: make the folder writable, or choose another",
    errno.EPERM: "permission denied: make the folder writable, or choose another",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EEXIST: "a file has the name of a folder that is needed, or is there already: choose another name",
    errno.EISDIR: "a folder has the name of the file to write: choose another name",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EMFILE: "this process has too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: end other programs, or raise its limit (ulimit -n)",
    errno.EIO: "the device reports an input/output error",
}


def explain(error: OSError) -> str:
    """Why a write failed and what to do about it, for a user."""
    reason = _REASONS.get(error.errno or 0)
    return f"{reason} ({error.strerror})" if reason else str(error)


CHOOSE_ANOTHER = "make it writable, or choose another folder"


def unwritable(folder: Path) -> str | None:
    """Why ``folder`` cannot be created or written to, as the end of a sentence that names it; None if it
    can. Creates nothing."""
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not place.is_dir():
        return f", where {place} is a file"
    return None if os.access(place, os.W_OK | os.X_OK) else f", and {place} is not writable"


def unwritable_file(path: Path) -> str | None:
    """As ``unwritable``, of a file to write or to replace."""
    return ", which is a folder" if path.is_dir() else unwritable(path.absolute().parent)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append ``lines`` to a text file, whatever ends the process afterwards; a line that a kill has cut stays
    one of its own. Raises OSError."""
    with open(path, "ab+") as file:
        if file.tell() and not _ends_a_line(file):
            file.write(b"\n")
        file.write("".join(f"{line}\n" for line in lines).encode())


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that ``append_lines`` has written, without empty ones; bytes that are none
    are replaced. None where the file is missing. Raises OSError."""
    if not path.is_file():
        return []
    # str.splitlines would also part lines at what JSON has within a text: U+2028, U+2029, U+0085.
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line]


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Make ``path`` a file that holds ``data``; replaces an earlier one. Creates the folder.

    Raises OSError; ``path`` is then as it was before.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file to write, which becomes ``path`` when the block ends; as ``atomic_write``, for what is too
    large to be held."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "x+b") as file:
            lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            # Inside the lock: after the rename, nothing can mistake the file for a leftover.
            os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # fsync(2) and write(2) report no file name
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty folder to fill, which replaces ``path`` when the block ends.

    If the block raises, ``path`` stays as it was.

    Raises OSError if the folder cannot be created, flushed or renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    temporary = _temporary_name(path)
    temporary.mkdir()
    descriptor = open_unforked(temporary, os.O_RDONLY)
    try:
        lock(descriptor)
        yield temporary
        publish_folder(temporary, path, replace=True)
    finally:
        close_unforked(descriptor)
        _remove(temporary)


def publish_folder(temporary: Path, path: Path, *, replace: bool) -> None:
    """Flush ``temporary``, a sibling of ``path``, to the device and rename it to ``path``.

    With ``replace`` the two swap names, so that ``path`` is never missing; without it, ``path`` must not
    exist or be an empty folder. Raises OSError; ``path`` is then as it was before.
    """
    flush_tree(temporary)
    if replace:
        _put_in_place(temporary, path)
    else:
        os.rename(temporary, path)
    _sync_folder(path.parent)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename; an existing ``path`` swaps names with ``temporary``, so that it is never missing."""
    if not os.path.lexists(path):
        os.rename(temporary, path)
    elif not _exchange(temporary, path):
        # Not a temporary's name: after a crash right here, this is the only copy.
        old = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_OLD_SUFFIX}")
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
        _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux, renameat2(2)); False where the system has no such call."""
    # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>; Python's os has no renameat2.
    at_cwd, rename_exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    # An old kernel, or a file system without exchange (NFS, some overlays).
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def flush_tree(folder: Path) -> None:
    """Flush every file and folder to the device. Raises OSError."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; there the rename is already durable.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool | None:
    """Take the lock that marks a file as being written: True if taken, False if another process holds it,
    None if the file system has no locks (nothing then counts as a leftover)."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) else None
    return True


@contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The block, while no other process of this machine (or, where its file system keeps locks for all, of
    any) is in one of the same ``path``, an empty file that stays. Without locks, at once.

    Args:
        waiting: called once if another process is there.

    Raises OSError where the file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_unforked(path, os.O_RDWR | os.O_CREAT)
    try:
        if lock(descriptor) is False:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        close_unforked(descriptor)


@contextmanager
def unless_another(path: Path) -> Iterator[bool]:
    """As ``one_at_a_time``, but waits for nobody: gives whether no other process is in such a block, which
    then none enters until this one ends.

    Raises OSError where the file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_unforked(path, os.O_RDWR | os.O_CREAT)
    try:
        yield lock(descriptor) is not False
    finally:
        close_unforked(descriptor)


_unforked: set[int] = set()


def open_unforked(path: Path, flags: int) -> int:
    """A descriptor that children do not get, neither those that are forked, such as a data loader's workers:
    one that outlives this process would keep its lock."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    _unforked.add(descriptor)
    return descriptor


def close_unforked(descriptor: int) -> None:
    """Lets go of its lock, too, at once: a child that was forked this moment may not have closed it yet."""
    _unforked.discard(descriptor)
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _close_in_child() -> None:
    while _unforked:
        with suppress(OSError):
            os.close(_unforked.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):  # gone meanwhile, or another user's: not ours to fail on
            # O_NOFOLLOW: a link of that name could point at anyone's file.
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                old = time.time() - os.fstat(descriptor).st_mtime > _LEFTOVER_AGE
                if old and lock(descriptor):
                    _remove(entry)
            finally:
                os.close(descriptor)


def unfinished(folder: Path) -> list[Path]:
    """What killed processes have left in ``folder``: half-written, half-removed or displaced."""
    names = (f".*{TEMPORARY_SUFFIX}", f"{DOOMED_PREFIX}*", f".*{_OLD_SUFFIX}")
    return sorted(entry for name in names for entry in folder.glob(name))


def clear_unfinished(folder: Path) -> None:
    """Remove what ``unfinished`` lists, however young, but for what another process is writing; what was
    displaced when its replacement was not there yet gets its name back."""
    for entry in unfinished(folder):
        name = entry.name.removeprefix(".").rpartition(".")[0].rpartition(".")[0]
        if entry.name.endswith(_OLD_SUFFIX) and not os.path.lexists(folder / name):
            os.rename(entry, folder / name)
            continue
        with suppress(OSError):  # gone meanwhile, or another user's
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if lock(descriptor) is not False:
                    _remove(entry)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
