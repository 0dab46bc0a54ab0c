"""Which run this is, and where an earlier part of it left off.

A run is its objective, its data, its start weights and its model: never its name, which NxDT's DPO
and ORPO configurations share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write

log = logging.getLogger(__name__)

IDENTITY_FILE = "run_identity.json"
CHECKPOINTS = "checkpoints"
DATE_FORMAT = "%Y-%m-%d_%H-%M-%S"


def run_identity(parts: Mapping[str, Any]) -> str:
    """Hex digest of what makes two runs the same one."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and the checkpoint that it goes on from, if there is one."""

    path: Path
    checkpoint: Path | None

    @property
    def version(self) -> str:
        return self.path.name


def find_run(
    parent: Path, identity: str, step_of: Callable[[Path], int | None], *, resume: bool
) -> RunFolder:
    """The newest dated folder of this identity under ``parent``, else a new one.

    Args:
        parent: ``<exp_dir>/<name>``.
        step_of: optimizer steps of a checkpoint folder, or None for what is not a whole checkpoint.
        resume: whether an earlier run may go on.
    """
    if resume and parent.is_dir():
        for folder in sorted((f for f in parent.iterdir() if f.is_dir()), reverse=True):
            if read_identity(folder) == identity:
                newest = newest_checkpoint(folder / CHECKPOINTS, step_of)
                if newest is not None:
                    return RunFolder(folder, newest)
    return RunFolder(_new_folder(parent), None)


def explicit_run(
    folder: Path, identity: str, step_of: Callable[[Path], int | None], *, resume: bool
) -> RunFolder:
    """The user's own folder: goes on where it is this run's. Raises UserError where it holds the
    checkpoints of another, which would be mixed up with this run's."""
    newest = newest_checkpoint(folder / CHECKPOINTS, step_of)
    if newest is None:
        return RunFolder(folder, None)
    if read_identity(folder) != identity:
        raise UserError(
            f"exp_manager.explicit_log_dir: {folder} holds checkpoints of another run (other objective, "
            "data, start weights or model); choose another folder"
        )
    if not resume:
        raise UserError(
            f"exp_manager.resume_if_exists: is False, but exp_manager.explicit_log_dir, {folder}, holds "
            "checkpoints of this run; set it to True to go on from them, or choose another folder"
        )
    return RunFolder(folder, newest)


def _new_folder(parent: Path) -> Path:
    """A dated name that is not taken; two runs can start in one second."""
    stamp = time.strftime(DATE_FORMAT)
    folder, count = parent / stamp, 1
    while folder.exists():
        count += 1
        folder = parent / f"{stamp}-{count}"
    return folder


def newest_checkpoint(folder: Path, step_of: Callable[[Path], int | None]) -> Path | None:
    """The whole checkpoint with the most optimizer steps."""
    if not folder.is_dir():
        return None
    whole = []
    for checkpoint in sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")):
        step = step_of(checkpoint)
        if step is None:
            log.warning("%s is not a whole checkpoint: passed over", checkpoint)
        else:
            whole.append((step, checkpoint))
    return max(whole, key=lambda pair: (pair[0], pair[1].name))[1] if whole else None


def read_identity(folder: Path) -> str | None:
    file = folder / IDENTITY_FILE
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    return str(content["identity"])


def write_identity(folder: Path, identity: str, parts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"identity": identity, "of": parts}, indent=2, sort_keys=True, default=str)
    atomic_write(folder / IDENTITY_FILE, text.encode())
