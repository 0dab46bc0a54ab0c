"""What leads from a source to its stored tokens: a file of JSON, see preparation.py, and writing it again
where all of a source's content was read to find that only its time or its place is another.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_align.data.open_files import require_room
from nxdt_align.files import atomic_file, atomic_write
from nxdt_align.messages import NOTICE

log = logging.getLogger(__name__)
VERSION = 1
"""Of the files in ``sources``, and of what is read of a source: increment it when a change gives other
records."""
BESIDE = ("rows", "labels")
"""Arrays that an index may have beside it."""


def read_index(path: Path, quiet: bool = False) -> dict[str, Any] | None:
    """None if there is none of this version, or it is damaged. Raises DataError where no further file can be
    opened."""
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        if about["version"] != VERSION and not quiet:
            log.log(NOTICE, "%s is of another version of nxdt-align: its source is read again", path)
        return about if about["version"] == VERSION else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        require_room(error, path)
        if not quiet:
            log.warning("%s is damaged (%s): its source is read again", path, error)
        return None


def write_index(path: Path, about: Mapping[str, Any]) -> None:
    """Raises OSError."""
    atomic_write(path, json.dumps(about, indent=1).encode())


def beside(index: Path, name: str) -> Path:
    """The file of one of ``BESIDE``."""
    return index.with_suffix(f".{name}.npy")


@dataclass(frozen=True)
class Renewal:
    """What was found to be true of a source by reading all of it, or all of its tokens, to be trusted from
    the next start on."""

    found: Path
    """The index that led to the tokens: of another place where the source was moved or is a copy."""
    was: Mapping[str, Any]
    own: Path
    """The index of the source's own place."""
    about: Mapping[str, Any]

    def write(self) -> None:
        """To be called while no other process writes there. Without effect where the index is no longer the
        one that was found, or cannot be written: then the next start reads all of it again."""
        if read_index(self.found, quiet=True) != self.was:
            return
        with suppress(OSError):
            for name in BESIDE if self.found != self.own else ():
                if self.was.get(f"{name}_file"):
                    with (
                        open(beside(self.found, name), "rb") as old,
                        atomic_file(beside(self.own, name)) as new,
                    ):
                        shutil.copyfileobj(old, new)
            write_index(self.own, self.about)
