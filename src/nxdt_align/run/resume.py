"""Which run this is, and which checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.engines.base import Engine
from nxdt_align.errors import UserError
from nxdt_align.losses.types import Loss
from nxdt_align.reference.cache import fingerprint_of
from nxdt_align.run.contracts import Checkpoints
from nxdt_align.run.places import Places
from nxdt_align.training.runs import RunFolder, explicit_run, find_run, run_identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, whatever its name."""

    parts: Mapping[str, Any]
    """Plain values, kept in the experiment's folder for people."""

    @property
    def digest(self) -> str:
        return run_identity(self.parts)


def identify(
    config: Config,
    data: ModelAlignmentDataModule,
    *,
    start: str,
    model: dict[str, Any],
    tokenization: str,
    loss: Loss | None,
) -> RunIdentity:
    """What makes two runs the same one. Data and start weights count by content; how they are
    laid out and spread over devices does not count.

    Args:
        start: fingerprint of the weights that training starts from.
        model: the model's config.json.
        tokenization: fingerprint of tokenizer, template and truncation.
        loss: one that stands in place of that which ``config`` names.
    """
    parts = {
        "objective": dataclasses.asdict(config.model_alignment_strategy),
        "data": fingerprint_of({"records": " ".join(data.record_ids("train"))}),
        "tokenization": tokenization,
        "order": [config.seed, config.data.global_batch_size],
        "start": start,
        "model": model,
    }
    return RunIdentity(parts if loss is None else parts | {"loss": repr(loss)})


def find(
    config: Config,
    places: Places,
    identity: RunIdentity,
    step_of: Callable[[Path], int | None],
    engine: Engine,
) -> RunFolder:
    """The folder of the run with this identity, and its newest checkpoint. Rank 0 looks; the others follow.

    Raises UserError where the YAML says that there must be a checkpoint and there is none.
    """
    settings = config.exp_manager
    run = None
    if engine.topology.rank == 0 and places.explicit is not None:
        run = explicit_run(places.explicit, identity.digest, step_of, resume=settings.resume_if_exists)
    elif engine.topology.rank == 0:
        run = find_run(places.runs, identity.digest, step_of, resume=settings.resume_if_exists)
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

    The run's own newest one goes before ``exp_manager.resume_from_checkpoint``, which is where it started.
    """
    given = config.exp_manager.resume_from_checkpoint
    if run.checkpoint is not None:
        log.info("resuming from this run's own checkpoint %s", run.checkpoint)
        if given is not None:
            log.info("resume_from_checkpoint=%s is not read again: it is where this run started", given)
        return run.checkpoint
    takes_all = given is not None and not config.model.weight_init_only
    if given is not None and takes_all and checkpoints.is_checkpoint(Path(given)):
        log.info("resuming from resume_from_checkpoint=%s, optimizer state included", given)
        return Path(given)
    log.info("a new run, from %s", start)
    return None
