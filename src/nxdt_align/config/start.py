"""Where training starts, and what a configuration takes from there by default: model's shape and tokenizer.

``exp_manager.resume_from_checkpoint`` may lead to weights, a run's folder, its folder of checkpoints, one of
them, or a link or file that names one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_align.config.faults import nearest
from nxdt_align.config.schema import Config

_HUB_MODEL = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII
)
IDENTITY_FILE = "run_identity.json"
SETTINGS_FILE = "config.yaml"
"""In a run's folder: its settings, defaults and overrides included, as ``nxdt-align config`` prints them."""
METRICS_FILE, EVENT_FILES = "metrics.jsonl", "events.out.tfevents.*"
"""In a run's folder: the values that it logged, as JSON lines and in TensorBoard's files."""
SAMPLES_FILE = "samples.jsonl"
"""In a run's folder: what the policy answered during evaluation."""
REPORT_FILE = "report.html"
CHECKPOINTS, EXPORT, FOR_EXPORT = "checkpoints", "hf_export", "for_export"
"""Folders in that of a run: its checkpoints, the policy for transformers, and what a checkpoint's export has
beside the weights: the tokenizer and the generation config."""
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
"""Files that a tokenizer has one of."""
_NEWEST = ("last_checkpoint", "latest_checkpoint", "last", "latest")
"""Names that stand for the newest checkpoint where nothing has them."""
_POINTER_BYTES = 4096
_SHARDS = "model"
"""Folder of NxD's shards in that of a checkpoint, whose config.json is beside it."""


@dataclass(frozen=True)
class HubModel:
    """A model of the Hugging Face Hub."""

    name: str
    """owner/name."""
    revision: str | None = None
    """A branch, a tag or a commit; None for the newest state."""

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def hub_model(value: str) -> HubModel | None:
    """The model that ``owner/name`` or ``owner/name@revision`` names. None where there is a folder of that
    name here, or one named ``owner``: the rest of a path in that is misspelt."""
    found = _HUB_MODEL.fullmatch(value)
    if found is None or Path(value).exists() or Path(found["name"]).parent.is_dir():
        return None
    return HubModel(found["name"], found["revision"])


def hub_models(config: Config) -> list[HubModel]:
    """Those that the configuration names."""
    given = (config.exp_manager.resume_from_checkpoint, config.model_alignment_strategy.reference_model)
    return [model for value in given if value is not None and (model := hub_model(value)) is not None]


def follow(path: Path) -> Path:
    """``path``, or where it leads: what a text file such as ``last_checkpoint`` names; the folder that a name
    of the newest checkpoint is in, where there is no file of this name."""
    if path.is_file() and path.stat().st_size <= _POINTER_BYTES:
        named = _named_by(path)
        return path if named is None else named
    if not path.exists() and path.name in _NEWEST and path.parent.is_dir():
        return path.parent
    return path


def _named_by(file: Path) -> Path | None:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    name = lines[0].strip()
    if not name or "\0" in name or any(line.strip() for line in lines[1:]):
        return None
    try:
        # Relative to the file, or to a run whose checkpoints it lists.
        places = [file.parent / name, file.parent / CHECKPOINTS / name]
        return next((place for place in places if place.is_dir()), None)
    except OSError:  # a name that the file system does not take
        return None


def near(missing: Path) -> str:
    """Advice about a folder that does not exist: the nearest name in the first folder above it that does."""
    absolute = missing.absolute()
    for child in (absolute, *absolute.parents):
        if not child.parent.is_dir():
            continue
        there = sorted(f.name for f in child.parent.iterdir() if not f.name.startswith("."))
        found = nearest(child.name, there)
        if found is not None:
            whole = child.parent / found / absolute.relative_to(child)
            return f"did you mean {whole if whole.exists() else child.parent / found}?"
        return "" if child == absolute else f"there is no {child.name} in {child.parent}"
    return ""


def run_folder(path: Path) -> Path | None:
    """The run that ``path`` is or is in, as a checkpoint is; None if there is none."""
    place = path.resolve()
    return next((f for f in (place, *list(place.parents)[:2]) if (f / IDENTITY_FILE).is_file()), None)


def model_config_path(config: Config) -> Path | None:
    """The file with the model's shape: that of model.model_config, or else of the start; None if neither is
    set. For a checkpoint of a run it is the run's ``run_identity.json``, see ``shape_in``."""
    chosen = config.model.model_config
    if chosen is not None:
        return Path(chosen) / "config.json" if Path(chosen).is_dir() else Path(chosen)
    start = config.exp_manager.resume_from_checkpoint
    return None if start is None else shape_file(Path(start))


def model_is_missing(config: Config) -> bool:
    """Whether the configuration names no model at all."""
    return config.model.model_config is None and config.exp_manager.resume_from_checkpoint is None


def shape_file(start: Path) -> Path:
    """The file with the shape of the weights at ``start``, which may not exist."""
    folder = follow(start)
    if folder.is_file():
        return folder if folder.suffix == ".json" else folder.parent / "config.json"
    own = folder / "config.json"
    if not own.is_file() and folder.name == _SHARDS and (folder.parent / "config.json").is_file():
        return folder.parent / "config.json"
    run = None if own.is_file() else run_folder(folder)
    return own if run is None else run / IDENTITY_FILE


def shape_in(file: Path, values: Any) -> Any:
    """The model's shape out of what ``file``, a config.json or a run's record, holds."""
    if file.name != IDENTITY_FILE:
        return values
    recorded = values.get("of") if isinstance(values, dict) else None
    return recorded.get("model") if isinstance(recorded, dict) else None


def tokenizer_of(config: Config) -> str:
    """data.tokenizer.type, or else the folder of the start or of model.model_config that has a tokenizer;
    empty if there is none."""
    if config.data.tokenizer.type:
        return config.data.tokenizer.type
    return next((str(folder) for folder in _model_folders(config) if holds_tokenizer(folder)), "")


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARIES)


def _model_folders(config: Config) -> Iterator[Path]:
    start = config.exp_manager.resume_from_checkpoint
    if start is not None:
        yield from folders_of(Path(start))
    if config.model.model_config is not None:
        chosen = Path(config.model.model_config)
        yield chosen if chosen.is_dir() else chosen.parent


def folders_of(start: Path) -> Iterator[Path]:
    """Where the tokenizer and the generation config of the weights at ``start`` may be, nearest first."""
    folder = follow(start)
    folder = folder.parent if folder.is_file() else folder
    yield folder
    if folder.name == _SHARDS:
        yield folder.parent
    run = run_folder(folder)
    if run is not None:
        yield from (run / FOR_EXPORT, run / EXPORT)
