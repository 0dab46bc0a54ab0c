"""The identity of a run, and the checkpoint that it resumes from; search.py finds the run's folder.

A run is identified by objective, data, start weights and model, not by its name, which NxDT's DPO and ORPO
configurations share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_align.config.schema import Config
from nxdt_align.config.start import CHECKPOINTS, IDENTITY_FILE
from nxdt_align.engines.base import Engine
from nxdt_align.engines.checkpoint_folder import CheckpointError
from nxdt_align.errors import SharedError, UserError
from nxdt_align.files import atomic_write
from nxdt_align.messages import NOTICE
from nxdt_align.run.contracts import Checkpoints

log = logging.getLogger(__name__)

RUN_RECORD = "nxdt_align"
"""Key of this package's values among a checkpoint's extra values."""


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
    records: str,
    *,
    start: str,
    model: dict[str, Any],
    tokenization: str,
    loss: str | None,
) -> RunIdentity:
    """The identity of a run. Data and start weights count by content; row layout and parallel sizes do not
    count.

    Args:
        records: fingerprint of the training data's records in their order.
        start: fingerprint of the weights that training starts from.
        model: the model's config.json.
        tokenization: fingerprint of tokenizer, template and truncation.
        loss: the repr of a loss that a script passed instead of the one in ``config``.
    """
    objective = dataclasses.asdict(config.model_alignment_strategy)
    if objective["peft"] is not None and objective["peft"]["quantize_base"] is None:
        del objective["peft"]["quantize_base"]  # runs from before there was this key go on
    parts = {
        "objective": objective,
        "data": records,
        "tokenization": tokenization,
        "order": [config.seed, config.data.global_batch_size],
        "start": start,
        "model": model,
    }
    return RunIdentity(parts if loss is None else parts | {"loss": loss})


def resume_point(
    config: Config, run: RunFolder, checkpoints: Checkpoints, start: object, engine: Engine
) -> Path | None:
    """The checkpoint to resume from, optimizer state and position included, and a log line that names it.

    The run's own newest one takes precedence over ``exp_manager.resume_from_checkpoint``, where it started.
    Raises UserError, on every rank, if that is damaged.
    """
    given = config.exp_manager.resume_from_checkpoint
    if run.checkpoint is not None:
        log.log(NOTICE, "resuming from this run's own checkpoint %s", run.checkpoint)
        if given is not None:
            log.log(NOTICE, "resume_from_checkpoint=%s is not read again: this run started from it", given)
        return run.checkpoint
    continued = continued_checkpoint(config, checkpoints, engine)
    if continued is not None:
        log.log(NOTICE, "resuming from resume_from_checkpoint=%s, optimizer state included", given)
        return continued
    log.log(NOTICE, "a new run, from %s, in %s", start, run.path)
    return None


def continued_checkpoint(config: Config, checkpoints: Checkpoints, engine: Engine) -> Path | None:
    """Another run's checkpoint that ``exp_manager.resume_from_checkpoint`` goes on from, optimizer state
    included; None where it gives the weights alone. Raises UserError, on every rank, if that is damaged."""
    given = another_runs_checkpoint(config, checkpoints)
    fault = None if given is None else fault_of(given, checkpoints, engine)
    if fault is not None:
        raise SharedError(f"exp_manager.resume_from_checkpoint: {fault}")
    return given


def another_runs_checkpoint(config: Config, checkpoints: Checkpoints) -> Path | None:
    """``continued_checkpoint``, whatever its files hold now."""
    given = config.exp_manager.resume_from_checkpoint
    if given is None or config.model.weight_init_only or not checkpoints.is_checkpoint(Path(given)):
        return None
    return Path(given)


def fault_of(checkpoint: Path, checkpoints: Checkpoints, engine: Engine) -> str | None:
    """What is wrong with it, the same on every rank; None if every byte is as it was written. Each rank reads
    its share of the files."""
    topology, own = engine.topology, None
    try:
        checkpoints.require_intact(checkpoint, topology.rank, topology.world_size)
        if topology.rank == 0:
            checkpoints.read_extra(checkpoint)
    except CheckpointError as error:
        own = str(error)
    return next((fault for fault in engine.gather_objects(own) if fault is not None), None)


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


def checkpoint_folders(folder: Path) -> list[Path]:
    """Whatever a run's folder holds as checkpoints, whole or not; not what is being written or removed."""
    found = folder / CHECKPOINTS
    if not found.is_dir():
        return []
    return sorted(f for f in found.iterdir() if f.is_dir() and not f.name.startswith("."))


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


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What ``write_identity`` wrote: the digest, ``identity``, and what it is ``of``; None if nothing.

    Raises UserError for a damaged file.
    """
    file = folder / IDENTITY_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        if not isinstance(record["identity"], str) or not isinstance(record["of"], dict):
            raise ValueError("it does not hold a run's identity")
        if run_identity(record["of"]) != record["identity"]:
            raise ValueError("the digest in it is not that of its content")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error})") from error
    return record


def write_identity(folder: Path, identity: str, parts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"identity": identity, "of": parts}, indent=2, sort_keys=True, default=str)
    atomic_write(folder / IDENTITY_FILE, text.encode())
