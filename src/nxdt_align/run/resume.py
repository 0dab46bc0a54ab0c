"""The identity of a run, and the checkpoint that it resumes from.

A run is identified by objective, data, start weights and model, not by its name, which NxDT's DPO and ORPO
configurations share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_align.config.schema import Config
from nxdt_align.config.start import CHECKPOINTS, IDENTITY_FILE
from nxdt_align.engines.base import Engine
from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write
from nxdt_align.messages import NOTICE
from nxdt_align.reference.cache import fingerprint_of
from nxdt_align.run.contracts import Checkpoints
from nxdt_align.run.differences import differences
from nxdt_align.run.places import Places

log = logging.getLogger(__name__)

DATE_FORMAT = "%Y-%m-%d_%H-%M-%S"


@dataclass(frozen=True)
class RunIdentity:
    """What identifies a run, independent of its name."""

    parts: Mapping[str, Any]
    """Plain values, also written to the experiment's folder for humans."""

    @property
    def digest(self) -> str:
        return run_identity(self.parts)


def identify(
    config: Config,
    record_ids: Sequence[str],
    *,
    start: str,
    model: dict[str, Any],
    tokenization: str,
    loss: str | None,
) -> RunIdentity:
    """The identity of a run. Data and start weights count by content; row layout and parallel sizes do not
    count.

    Args:
        record_ids: of the training data, in their order.
        start: fingerprint of the weights that training starts from.
        model: the model's config.json.
        tokenization: fingerprint of tokenizer, template and truncation.
        loss: the repr of a loss that a script passed instead of the one in ``config``.
    """
    parts = {
        "objective": dataclasses.asdict(config.model_alignment_strategy),
        "data": fingerprint_of({"records": " ".join(record_ids)}),
        "tokenization": tokenization,
        "order": [config.seed, config.data.global_batch_size],
        "start": start,
        "model": model,
    }
    return RunIdentity(parts if loss is None else parts | {"loss": loss})


def find(
    config: Config,
    places: Places,
    identity: RunIdentity,
    step_of: Callable[[Path], int | None],
    engine: Engine,
) -> RunFolder:
    """The folder of the run with this identity, and its newest checkpoint. Rank 0 searches and
    tells the others. If there is none, a warning says how the runs of this name differ.

    Raises UserError if the YAML requires a checkpoint and there is none.
    """
    settings = config.exp_manager
    run = None
    if engine.topology.rank == 0 and places.explicit is not None:
        run = explicit_run(places.explicit, identity, step_of, resume=settings.resume_if_exists)
    elif engine.topology.rank == 0:
        run = find_run(places.runs, identity.digest, step_of, resume=settings.resume_if_exists)
        if run.checkpoint is None and settings.resume_if_exists:
            _warn_of_other_runs(places.runs, identity, step_of)
    found: RunFolder = engine.broadcast_object(run)
    must_resume = settings.resume_if_exists and not settings.resume_ignore_no_checkpoint
    if found.checkpoint is None and must_resume:
        raise UserError(
            "exp_manager.resume_ignore_no_checkpoint: is False, so a run with resume_if_exists must find "
            f"a checkpoint of its own, but {found.path.parent} has none; True starts a new run"
        )
    return found


def resume_point(config: Config, run: RunFolder, checkpoints: Checkpoints, start: object) -> Path | None:
    """The checkpoint to resume from, optimizer state and position included, and a log line that names it.

    The run's own newest one takes precedence over ``exp_manager.resume_from_checkpoint``, where it started.
    """
    given = config.exp_manager.resume_from_checkpoint
    if run.checkpoint is not None:
        log.log(NOTICE, "resuming from this run's own checkpoint %s", run.checkpoint)
        if given is not None:
            log.info("resume_from_checkpoint=%s is not read again: this run started from it", given)
        return run.checkpoint
    takes_all = given is not None and not config.model.weight_init_only
    if given is not None and takes_all and checkpoints.is_checkpoint(Path(given)):
        log.log(NOTICE, "resuming from resume_from_checkpoint=%s, optimizer state included", given)
        return Path(given)
    log.log(NOTICE, "a new run, from %s, in %s", start, run.path)
    return None


# Folders of runs


def run_identity(parts: Mapping[str, Any]) -> str:
    """Hex digest of a run's identity. Its values must never change, or runs would no longer resume."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """A run's output folder, and the checkpoint that it resumes from, if any."""

    path: Path
    checkpoint: Path | None


def find_run(
    parent: Path, identity: str, step_of: Callable[[Path], int | None], *, resume: bool
) -> RunFolder:
    """The newest dated folder of this identity under ``parent``, else a new one.

    Args:
        parent: ``<exp_dir>/<name>``.
        step_of: optimizer steps of a checkpoint folder; None if it is not a complete checkpoint.
        resume: whether an earlier run may be resumed.
    """
    if resume and parent.is_dir():
        for folder in sorted((f for f in parent.iterdir() if f.is_dir()), reverse=True):
            if read_identity(folder) == identity:
                newest = newest_checkpoint(folder / CHECKPOINTS, step_of)
                if newest is not None:
                    return RunFolder(folder, newest)
    return RunFolder(_new_folder(parent), None)


def explicit_run(
    folder: Path, identity: RunIdentity, step_of: Callable[[Path], int | None], *, resume: bool
) -> RunFolder:
    """The folder that the user chose, resumed if it is this run's. Raises UserError if it holds checkpoints
    of another run, which would mix with this run's."""
    newest = newest_checkpoint(folder / CHECKPOINTS, step_of)
    if newest is None:
        return RunFolder(folder, None)
    if read_identity(folder) != identity.digest:
        raise UserError(
            f"exp_manager.explicit_log_dir: {folder} holds checkpoints of another run"
            f"{_list(_differences_from(folder, identity))}; choose another folder"
        )
    if not resume:
        raise UserError(
            f"exp_manager.resume_if_exists: is False, but exp_manager.explicit_log_dir, {folder}, holds "
            "checkpoints of this run; set it to True to resume from them, or choose another folder"
        )
    return RunFolder(folder, newest)


def _warn_of_other_runs(parent: Path, identity: RunIdentity, step_of: Callable[[Path], int | None]) -> None:
    """Name the run with checkpoints under ``parent`` that is nearest to this one, newest first, and what
    differs."""
    nearest: tuple[int, Path, Path, dict[str, list[str]]] | None = None
    for folder in sorted((f for f in parent.glob("*") if f.is_dir()), reverse=True):
        found = _differences_from(folder, identity)
        count = sum(map(len, found.values()))
        newest = newest_checkpoint(folder / CHECKPOINTS, step_of) if found else None
        if newest is not None and (nearest is None or count < nearest[0]):
            nearest = (count, folder, newest, found)
    if nearest is not None:
        _, folder, newest, found = nearest
        log.warning(
            "not resumed: %s, whose newest checkpoint is %s, is another run%s. A new run starts",
            *(folder, newest.name, _list(found)),
        )


def _differences_from(folder: Path, identity: RunIdentity) -> dict[str, list[str]]:
    """By part of the identity; empty if they are the same, or if ``folder`` is no run's."""
    record = _identity_record(folder)
    return {} if record is None else differences(record["of"], identity.parts)


def _list(found: Mapping[str, Sequence[str]]) -> str:
    """In words; nothing if what differs is not known."""
    if not found:
        return ""
    return ". Different " + "; ".join(f"{part}: {', '.join(words)}" for part, words in found.items())


def _new_folder(parent: Path) -> Path:
    """An unused dated name; two runs can start within one second."""
    stamp = time.strftime(DATE_FORMAT)
    folder, count = parent / stamp, 1
    while folder.exists():
        count += 1
        folder = parent / f"{stamp}-{count}"
    return folder


def newest_checkpoint(folder: Path, step_of: Callable[[Path], int | None]) -> Path | None:
    """The complete checkpoint with the most optimizer steps."""
    if not folder.is_dir():
        return None
    whole = []
    for checkpoint in sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")):
        step = step_of(checkpoint)
        if step is None:
            log.warning("%s is not a complete checkpoint: skipped", checkpoint)
        else:
            whole.append((step, checkpoint))
    return max(whole, key=lambda pair: (pair[0], pair[1].name))[1] if whole else None


def read_identity(folder: Path) -> str | None:
    """The digest of the run in ``folder``; None if there is none. Raises UserError for a damaged file."""
    record = _identity_record(folder)
    return None if record is None else str(record["identity"])


def _identity_record(folder: Path) -> dict[str, Any] | None:
    """What ``write_identity`` wrote."""
    file = folder / IDENTITY_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        if not isinstance(record["identity"], str) or not isinstance(record["of"], dict):
            raise ValueError("it does not hold a run's identity")
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error}), so which run {folder} holds is unknown; restore the file, or move "
            "the folder elsewhere to start a new run"
        ) from error
    return record


def write_identity(folder: Path, identity: str, parts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"identity": identity, "of": parts}, indent=2, sort_keys=True, default=str)
    atomic_write(folder / IDENTITY_FILE, text.encode())
