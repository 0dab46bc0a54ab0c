"""Which weights a path leads to, and what belongs to them: the model's shape, the tokenizer, the generation
config."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxdt_align.config.schema import Config
from nxdt_align.config.start import (
    CHECKPOINTS,
    EXPORT,
    FOR_EXPORT,
    IDENTITY_FILE,
    folders_of,
    follow,
    hub_model,
    near,
    shape_file,
    shape_in,
)
from nxdt_align.engines.native import checkpoint as native
from nxdt_align.engines.nxd import checkpoint as nxd
from nxdt_align.errors import UserError
from nxdt_align.files import TEMPORARY_SUFFIX, atomic_folder
from nxdt_align.messages import NOTICE
from nxdt_align.models.backend.config import REMOTE_FOLDER
from nxdt_align.models.presets import Implementation, ModelShape, model_of, read_model_json
from nxdt_align.run.hub import fetch_model
from nxdt_align.run.resume import newest_checkpoint
from nxdt_align.weights.detect import holds_weights
from nxdt_align.weights.digests import require_unchanged
from nxdt_align.weights.generation import GENERATION, read_generation
from nxdt_align.weights.hf_writer import copy_files, holds_tokenizer, tokenizer_files, write_json
from nxdt_align.weights.nxdt_files import DONE, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_START = "exp_manager.resume_from_checkpoint"
_LISTED = 10
_STEP = re.compile(r"step=(\d+)")


def locate(path: Path) -> Path:
    """The weights that ``path`` leads to: itself, or the newest whole checkpoint (else the export) of a run's
    folder or its folder of checkpoints, which a link or a file may name.

    A model of the Hub, ``owner/name``, is fetched. Raises UserError if there is nothing at ``path``, a run
    without weights, or several runs.
    """
    named = hub_model(str(path))
    if named is not None:
        return fetch_model(named, weights=True)
    found = follow(path.expanduser())
    if not found.exists():
        advice = near(found) or "give a folder of weights, a run or a checkpoint of one"
        raise UserError(f"{path} does not exist: {advice}")
    if found.is_file() or is_checkpoint(found) or holds_weights(found):
        return found
    is_run = (found / IDENTITY_FILE).is_file()
    holder = found / CHECKPOINTS if (found / CHECKPOINTS).is_dir() else found
    if is_run or any(map(is_checkpoint, _folders(holder))):
        newest = newest_checkpoint(holder, checkpoint_step)
    else:
        newest = _newest_of_nxdt(holder) if holder.name == CHECKPOINTS else None
        if newest is None and found.name != CHECKPOINTS:
            refuse_runs(found)
            return found
    if newest is not None:
        log.log(NOTICE, "%s: its newest checkpoint is %s", path, newest)
        return newest
    if (found / EXPORT / "config.json").is_file():
        log.log(NOTICE, "%s has no checkpoint: taking its export %s", path, EXPORT)
        return found / EXPORT
    raise UserError(
        f"{found} has no whole checkpoint{_what_is_there(holder)}: name another run, or start this one again"
        if is_run or found.name == CHECKPOINTS
        else f"{found} holds no whole checkpoint{_what_is_there(holder)}: take another"
    )


def _newest_of_nxdt(holder: Path) -> Path | None:
    """Of NxD Training's checkpoints in ``holder``, which have their steps in their names; None where there is
    none. Raises UserError where a name has no step."""
    whole = [f for f in _folders(holder) if (f / DONE).is_file() and model_folder(f) is not None]
    steps = {f: int(match[1]) for f in whole if (match := _STEP.search(f.name))}
    if len(steps) < len(whole) > 1:
        names = ", ".join(f.name for f in whole[:_LISTED])
        raise UserError(f"{holder} holds several checkpoints of NxD ({names}): name one of them")
    return max(whole, key=lambda f: (steps.get(f, 0), f.name), default=None)


def checkpoint_step(path: Path) -> int | None:
    """The optimizer steps of a whole checkpoint of either engine; None where ``path`` is not one."""
    step = native.checkpoint_step(path)
    return nxd.checkpoint_step(path) if step is None else step


def is_checkpoint(path: Path) -> bool:
    return native.is_checkpoint(path) or nxd.is_checkpoint(path)


def _folders(parent: Path) -> list[Path]:
    return sorted(f for f in parent.iterdir() if f.is_dir()) if parent.is_dir() else []


def refuse_runs(folder: Path) -> None:
    """Raise UserError for a folder of runs, one or two levels up from theirs."""
    below = [f for child in _folders(folder) for f in (child, *_folders(child))]
    runs = [f for f in below if (f / IDENTITY_FILE).is_file()]
    if runs:
        newest = sorted(runs, key=lambda run: run.name, reverse=True)
        names = ", ".join(str(run.relative_to(folder)) for run in newest[:_LISTED])
        more = f" and {len(runs) - _LISTED} more" if len(runs) > _LISTED else ""
        raise UserError(
            f"{folder} is a folder of {'runs' if len(runs) > 1 else 'one run'} ({names}{more}): name one, "
            f"such as {newest[0]}"
        )


def _what_is_there(holder: Path) -> str:
    """What a folder of checkpoints without a whole one holds, as the end of a sentence."""
    names = [folder.name for folder in _folders(holder)]
    unfinished = [name for name in names if name.endswith(TEMPORARY_SUFFIX)]
    damaged = [name for name in names if not name.startswith(".") and is_checkpoint(holder / name)]
    if damaged:
        return f", as {', '.join(damaged[:_LISTED])} {'is' if len(damaged) == 1 else 'are'} incomplete"
    if unfinished:
        return ", only what an interrupted save has left"
    return ""


def with_located_start(config: Config) -> Config:
    """``config`` with the weights that its ``resume_from_checkpoint`` leads to. Raises UserError."""
    given = config.exp_manager.resume_from_checkpoint
    if given is None:
        return config
    try:
        found = locate(Path(given))
    except UserError as error:
        raise UserError(f"{_START}: {error}") from error
    if found == Path(given):
        return config
    return dataclasses.replace(
        config, exp_manager=dataclasses.replace(config.exp_manager, resume_from_checkpoint=str(found))
    )


# What belongs to weights


def read_shape(
    file: Path, implementation: Implementation = "auto", *, trust_remote_code: bool = False
) -> ModelShape:
    """The model's shape in a config.json, or in the record of a run. Raises UserError.

    A run's record of a model whose own code was run says so; it is not run again but by
    ``trust_remote_code``.
    """
    if file.name != IDENTITY_FILE:
        require_unchanged(file)
        return read_model_json(file, implementation, trust_remote_code=trust_remote_code)
    try:
        values = shape_in(file, json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{file} is damaged ({error}), so the model's shape is unknown: give its config.json "
            "(model.model_config, --config)"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no model's shape: give its config.json (model.model_config, --config)")
    folder = values.pop(REMOTE_FOLDER, None)
    return model_of(
        values, implementation, where=str(file), remote_folder=folder if trust_remote_code else None
    )


def shape_of_run(checkpoint: Path) -> ModelShape | None:
    """The shape of a checkpoint of a run, or of a converted one, which has its own config.json; None where
    nothing says it."""
    file = shape_file(checkpoint)
    return read_shape(file) if file.is_file() else None


@dataclass(frozen=True)
class Companions:
    """What a folder for transformers has beside weights and shape."""

    tokenizer: Mapping[str, Path] = field(default_factory=dict)
    """Files by their names in the folder; empty where there is no tokenizer."""
    generation: Mapping[str, Any] | None = None
    """Of generation_config.json; None where there is none."""
    generation_folder: Path | None = None


def companions(weights: Path | None, config_file: Path | None = None) -> Companions:
    """Of weights that ``locate`` found; the folder of ``config_file``, the model's config.json, may have
    them too. Raises UserError for a generation config that cannot be read."""
    folders = [] if weights is None else list(folders_of(weights))
    if config_file is not None:
        folders.append(config_file if config_file.is_dir() else config_file.parent)
    tokenizer = next((tokenizer_files(folder) for folder in folders if holds_tokenizer(folder)), {})
    for folder in folders:
        generation = read_generation(folder)
        if generation is not None:
            return Companions(tokenizer, generation, folder)
    return Companions(tokenizer)


def keep_companions(run: Path, tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, Any]) -> None:
    """Write them into a run's folder, where ``companions`` finds them for its checkpoints. Raises OSError."""
    with atomic_folder(run / FOR_EXPORT) as folder:
        own = Path(tokenizer.name_or_path)
        if own.is_dir() and holds_tokenizer(own):
            copy_files(tokenizer_files(own), folder)  # as they are: transformers may write others
        else:
            tokenizer.save_pretrained(folder)
        write_json(folder / GENERATION, generation)
