"""Which folder a run goes on in, and from which of its checkpoints: never by name alone, never from a damaged
one, and never silently from step 0."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nxdt_align.config.schema import Config
from nxdt_align.config.start import CHECKPOINTS, IDENTITY_FILE
from nxdt_align.engines.base import Engine
from nxdt_align.engines.checkpoint_folder import CheckpointError
from nxdt_align.engines.native import checkpoint as native
from nxdt_align.engines.nxd import checkpoint as nxd
from nxdt_align.errors import SharedError, UserError
from nxdt_align.files import explain
from nxdt_align.run.contracts import Checkpoints
from nxdt_align.run.differences import differences
from nxdt_align.run.folder_lock import FolderLock, claim_dated, clear_if_free
from nxdt_align.run.places import Places
from nxdt_align.run.resume import (
    RUN_RECORD,
    RunFolder,
    RunIdentity,
    checkpoint_folders,
    fault_of,
    read_identity,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

RESUME, EXPLICIT = "exp_manager.resume_if_exists", "exp_manager.explicit_log_dir"
_ENGINES: Mapping[str, Any] = {"native": native, "nxd": nxd}


@contextmanager
def find(
    config: Config, places: Places, identity: RunIdentity, checkpoints: Checkpoints, engine: Engine
) -> Iterator[RunFolder]:
    """The folder of the run with this identity, and its newest whole checkpoint, or a new folder. No other
    run can have it inside the context. Every rank calls this; rank 0 searches and tells the others.

    Raises UserError, on every rank: another run holds the folder; the run has checkpoints, but none is whole
    or which run they are of is unknown; the YAML requires a checkpoint and there is none.
    """
    with ExitStack() as held:
        search = Search(config, places, identity, checkpoints, held)
        candidates = search.candidates() if engine.topology.rank == 0 else iter(())
        while True:
            chosen = _from_first(engine, lambda: next(candidates, None))
            fault = None if chosen is None else fault_of(chosen, checkpoints, engine)
            if fault is None:
                break
            search.faults.append(fault)
        yield _from_first(engine, lambda: search.conclude(chosen))


def _from_first(engine: Engine, act: Callable[[], T]) -> T:
    """What ``act`` returns on rank 0, on every rank. What it raises there, all raise, as SharedError."""
    value: Any = None
    fault: UserError | None = None
    if engine.topology.rank == 0:
        try:
            value = act()
        except UserError as error:
            fault = error
        except OSError as error:
            fault = UserError(f"{error.filename}: {explain(error)}" if error.filename else explain(error))
    value, told = engine.broadcast_object((value, None if fault is None else str(fault)))
    if told is not None:
        raise SharedError(told) from fault
    result: T = value
    return result


@dataclass(frozen=True)
class _Found:
    """A folder that a run may have written."""

    path: Path
    checkpoints: list[Path]
    """Whole or not."""
    identity: str | None
    """None if it is unknown."""
    parts: Mapping[str, Any] | None
    """What the identity is of; None if only its digest is known."""
    problem: str
    """Why the identity's file does not say it; empty if it does."""

    @property
    def is_ours(self) -> bool:
        """Whether this package wrote a checkpoint in it, and not NxDT, whose folders have the same places."""
        return any(engine.is_checkpoint(each) for each in self.checkpoints for engine in _ENGINES.values())


def _look(folder: Path) -> _Found:
    """By the identity's file, or where that is lost by what the newest readable checkpoint says."""
    found = checkpoint_folders(folder)
    try:
        record, problem = read_identity(folder), f"{folder / IDENTITY_FILE} is missing"
    except UserError as error:
        record, problem = None, str(error)
    if record is not None:
        return _Found(folder, found, record["identity"], record["of"], "")
    for checkpoint in sorted(found, key=_order, reverse=True):
        for engine in _ENGINES.values():
            if engine.is_checkpoint(checkpoint):
                try:
                    told = engine.read_extra(checkpoint)[RUN_RECORD]["identity"]
                except (CheckpointError, LookupError, TypeError):
                    continue
                return _Found(folder, found, str(told), None, problem)
    return _Found(folder, found, None, None, problem)


def _order(checkpoint: Path) -> tuple[int, str]:
    """Oldest first; what is not complete comes before all others."""
    steps = (engine.checkpoint_step(checkpoint) for engine in _ENGINES.values())
    return max(-1 if step is None else step for step in steps), checkpoint.name


class Search:
    """Rank 0's part of ``find``.

    Args:
        held: keeps the lock of the folder that is looked into.
    """

    def __init__(
        self,
        config: Config,
        places: Places,
        identity: RunIdentity,
        checkpoints: Checkpoints,
        held: ExitStack,
    ) -> None:
        self._settings = config.exp_manager
        self._places, self._identity, self._checkpoints, self._held = places, identity, checkpoints, held
        self._looked: list[_Found] = []
        self.faults: list[str] = []
        """What is wrong with the checkpoints that were passed over."""

    def candidates(self) -> Iterator[Path]:
        """Checkpoints to resume from, the best first; the folder of each is locked."""
        if self._places.explicit is not None:
            yield from self._in_explicit(self._places.explicit)
            return
        parent = self._places.runs
        folders = sorted((f for f in parent.glob("*") if f.is_dir()), reverse=True)
        self._looked = [_look(folder) for folder in folders]
        for index, found in enumerate(self._looked):
            # Before its checkpoints count: one that was being replaced gets its name back.
            if found.identity == self._identity.digest and clear_if_free(found.path):
                self._looked[index] = _look(found.path)
        if self._settings.resume_if_exists:
            for found in self._of_this_run():
                if found.checkpoints:
                    self._lock(found.path)
                    yield from self._in(found)

    def conclude(self, chosen: Path | None) -> RunFolder:
        """The folder that was found, locked; ``chosen`` is the first candidate without a fault."""
        explicit, resume = self._places.explicit, self._settings.resume_if_exists
        unknown = [f for f in self._looked if f.identity is None and f.is_ours]
        if chosen is not None:
            self._report(chosen, unknown)
            return RunFolder(chosen.parent.parent, chosen)
        if self.faults:
            raise UserError(self._nothing_whole())
        if resume and unknown:
            folder = unknown[0].path
            raise UserError(f"{_not_known(unknown[0])}: restore the file, {_anew(folder, explicit)}")
        if resume and not self._settings.resume_ignore_no_checkpoint:
            place = explicit or self._places.runs
            raise UserError(
                "exp_manager.resume_ignore_no_checkpoint: is False, so a run with resume_if_exists must find "
                f"a checkpoint of its own, but {place} has none; True starts a new run"
            )
        if explicit is not None:
            return RunFolder(explicit, None)
        if resume:
            warn_of_other_runs(self._looked, self._identity)
        self._held.close()
        return RunFolder(self._held.enter_context(claim_dated(self._places.runs)).folder, None)

    def _in_explicit(self, folder: Path) -> Iterator[Path]:
        """Raises UserError if it holds checkpoints of another run, which would mix with this run's, or of
        this run although it must not be resumed."""
        found, resume = _look(folder), self._settings.resume_if_exists
        self._looked = [found]
        is_this_run = found.identity == self._identity.digest
        if found.is_ours and found.identity is None:
            raise UserError(f"{_not_known(found)}: restore the file, {_anew(found.path, folder)}")
        if found.is_ours and not is_this_run:
            raise UserError(
                f"{EXPLICIT}: {folder} holds checkpoints of another run"
                f"{_list(_differences(found, self._identity))}; choose another folder"
            )
        if found.is_ours and not resume:
            raise UserError(
                f"{RESUME}: is False, but {EXPLICIT}, {folder}, holds "
                "checkpoints of this run; set it to True to resume from them, or choose another folder"
            )
        self._lock(folder)
        if is_this_run and resume:
            yield from self._in(found)

    def _of_this_run(self) -> list[_Found]:
        return [found for found in self._looked if found.identity == self._identity.digest]

    def _lock(self, folder: Path) -> None:
        self._held.close()
        advice = (
            f"Wait for it or end it; {RESUME}=False starts another run, at step 0, in a folder of its own"
        )
        if self._places.explicit is not None:
            advice = f"Wait for it, end it, or choose another {EXPLICIT}"
        self._held.enter_context(FolderLock(folder, advice)).clear()

    def _in(self, found: _Found) -> Iterator[Path]:
        """Its checkpoints, listed anew, as they are under the lock: what is not complete, to be named; then
        the newest first."""
        ordered = sorted(checkpoint_folders(found.path), key=_order, reverse=True)
        for checkpoint in sorted(ordered, key=lambda each: _order(each)[0] >= 0):
            others = [name for name, e in _ENGINES.items() if e.is_checkpoint(checkpoint)]
            if others and not self._checkpoints.is_checkpoint(checkpoint):
                log.warning("%s is a checkpoint of engine %s: skipped", checkpoint, others[0])
            else:
                yield checkpoint

    def _report(self, chosen: Path, unknown: Sequence[_Found]) -> None:
        for found in unknown:
            log.warning("%s: they are not looked at", _not_known(found))
        for found in self._of_this_run():
            if found.problem and found.path == chosen.parent.parent:
                log.warning(
                    "%s; its checkpoints say that it is this run, and it is written again", found.problem
                )
        for fault in self.faults:
            log.warning("not resumed from: %s", fault)
        if self.faults:
            step = self._checkpoints.checkpoint_step(chosen)
            log.warning("resuming from step %s instead, %s", step, chosen)

    def _nothing_whole(self) -> str:
        folder = self._of_this_run()[0].path
        listed = "".join(f"\n  {fault}" for fault in self.faults)
        return (
            f"{RESUME}: is True, but no checkpoint of this run in {folder / CHECKPOINTS} is whole:{listed}\n"
            f"Restore one from a copy, {_anew(folder, self._places.explicit)}"
        )


def _anew(folder: Path, explicit: Path | None) -> str:
    if explicit is not None:
        return f"or start anew, at step 0, with another {EXPLICIT}"
    return f"or start anew, at step 0, with {RESUME}=False, or by moving {folder} elsewhere"


def _not_known(found: _Found) -> str:
    place = found.path / CHECKPOINTS
    return f"{found.problem}, and the checkpoints in {place} do not say either which run they are of"


def warn_of_other_runs(looked: Sequence[_Found], identity: RunIdentity) -> None:
    """Name the run with checkpoints that is nearest to this one, newest first, and what differs."""
    nearest: tuple[float, _Found, dict[str, list[str]]] | None = None
    for found in looked:
        whole = [each for each in found.checkpoints if _order(each)[0] >= 0]
        if found.identity in (None, identity.digest) or not whole:
            continue
        words = _differences(found, identity)
        count = sum(map(len, words.values())) or float("inf")
        if nearest is None or count < nearest[0]:
            nearest = count, found, words
    if nearest is not None:
        _, found, words = nearest
        log.warning(
            "not resumed: %s, whose newest checkpoint is %s, is another run%s. A new run starts",
            *(found.path, max(found.checkpoints, key=_order).name, _list(words)),
        )


def _differences(found: _Found, identity: RunIdentity) -> dict[str, list[str]]:
    """By part of the identity; empty if they are not known."""
    return {} if found.parts is None else differences(found.parts, identity.parts)


def _list(found: Mapping[str, Sequence[str]]) -> str:
    """In words; nothing if what differs is not known."""
    if not found:
        return ""
    return ". Different " + "; ".join(f"{part}: {', '.join(words)}" for part, words in found.items())
