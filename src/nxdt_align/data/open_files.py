"""The limit of a process's open files: a file of tokens that is mapped keeps a descriptor as long as it is in
use, so that a mixture of hundreds of files can reach a shell's usual 1,024.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from nxdt_align.data.records import DataError

_EACH = 3
"""Descriptors per file of tokens: itself, its rows and its labels."""
_SPARE = 512
"""For what else a run opens: processes that tokenize or load, its folder, its connections."""


def make_room(files: int) -> None:
    """Raise the soft limit, as far as this many files of tokens need and the hard limit allows. Where it
    cannot be raised it stays, and ``require_room`` says so if it is reached."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        needed = len(os.listdir("/dev/fd")) + _EACH * files + _SPARE
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= needed:
            return
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require_room(error: BaseException, what: object) -> None:
    """Raise DataError where ``error`` says that no further file can be opened, and nothing of ``what``."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise DataError(
            f"{what} cannot be opened: {os.strerror(error.errno)}. Every file of a mixture takes up to "
            f"{_EACH} of them: raise the limit (ulimit -n), or join the data into fewer files"
        ) from error
