"""Detects the kind of weights at a path, and opens a reader for them."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Literal

from nxdt_align.models.presets import (
    DecoderConfig,
    ModelShape,
    load_config_json,
    read_config_json,
    read_model_json,
    weight_shapes,
)
from nxdt_align.named_tensors import WeightSource, require_fit
from nxdt_align.weights.digests import require_unchanged
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf import WEIGHT_FILES, FreshWeights, HFFolder
from nxdt_align.weights.meta import PARAMS, MetaFolder, is_meta_folder
from nxdt_align.weights.names import UnknownNameError, parts_of, to_hf
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.nxdt_files import MODEL, model_folder
from nxdt_align.weights.peft import SETTINGS as ADAPTER
from nxdt_align.weights.peft import MergedWeights, PeftFolder, is_peft_folder, read_settings
from nxdt_align.weights.staging import JOURNAL

log = logging.getLogger(__name__)

ARCHIVE = "policy.pt"
"""The weights in a folder that the reference DPO implementation saves, beside those of the optimizer."""
_FIRST_FORMAT = re.compile(r"^tp_rank_\d+_pp_rank_\d+")
_SIZES = (
    "num_hidden_layers, hidden_size, tie_word_embeddings, biases and the other sizes must be those of the "
    "weights"
)
Layout = Literal["hf", "nxdt", "meta"]


def layout_of(path: Path) -> Layout:
    """The kind of weights at ``path``. Raises WeightsError if there is nothing, or nothing complete."""
    if not path.exists():
        raise WeightsError(f"{path} does not exist: give a folder of weights")
    if (path / JOURNAL).is_file():
        raise WeightsError(f"{path} is the leftover of an interrupted conversion: finish that with --resume")
    if path.is_dir() and model_folder(path) is not None:
        return "nxdt"
    _refuse_first_format(path)
    _refuse_adapter(path)
    return "meta" if is_meta_folder(path) else "hf"


def _refuse_first_format(path: Path) -> None:
    """Raise WeightsError for NxD's older checkpoint format, which names files differently."""
    for folder in (path, path / MODEL):
        old = (
            sorted(f.name for f in folder.iterdir() if _FIRST_FORMAT.match(f.name)) if folder.is_dir() else []
        )
        if old:
            raise WeightsError(
                f"{folder / old[0]} is of the first format that NxD saved checkpoints in "
                "(parallel_layers.checkpointing.save), which is not read. Its content is the same: move each "
                "tp_rank_TT_pp_rank_PP/checkpoint.pt (with xser: tp_rank_TT_pp_rank_PP and its .tensors) to "
                "model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt (and .pt.tensors)"
            )


def _refuse_adapter(path: Path) -> None:
    """Raise WeightsError for what PEFT saves of an adapter alone: what it adds to a model, without that."""
    folder = path.parent if path.is_file() else path
    file = folder / ADAPTER
    if not file.is_file() or (path.is_file() and not path.name.startswith("adapter_model")):
        return
    if path.is_dir() and holds_weights(path):
        log.warning("%s holds a PEFT adapter beside the weights; it is not read", path)
        return
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        kind, base = (str(said.get(key) or "unknown") for key in ("peft_type", "base_model_name_or_path"))
    except (ValueError, OSError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{file} of a PEFT adapter cannot be read: {error}; copy it again") from error
    raise WeightsError(
        f"{folder} is a PEFT adapter ({kind}, base model {base}) and no model by itself: nxdt-align export "
        f"--merge {shlex.quote(str(folder))} MERGED writes the model with it, where base_model_name_or_path "
        f"in {ADAPTER} names the base model's folder"
    )


def open_adapter(path: Path) -> tuple[MergedWeights, ModelShape]:
    """A PEFT folder and its base model, which must be a folder on this machine. Raises WeightsError."""
    base = base_folder(path)
    weights, config = open_source(base)
    return MergedWeights(weights, PeftFolder(path, config)), config


def base_folder(path: Path) -> Path:
    """The folder of the base model of the PEFT folder ``path``. Raises WeightsError where it is not here."""
    said = read_settings(path).get("base_model_name_or_path")
    places = [Path(said), path / said] if isinstance(said, str) and said else []
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise WeightsError(
            f"{path} is a PEFT adapter (LORA, base model {said or 'unknown'}), whose base is no folder on "
            f"this machine: set base_model_name_or_path in {path / ADAPTER} to the base model's folder"
        )
    if (found / "config.json").is_file() and "quantization_config" in load_config_json(found)[1]:
        raise WeightsError(
            f"{path} is a PEFT adapter whose base {found} is quantised, and what is added to such weights "
            f"would have to be rounded anew: set base_model_name_or_path in {path / ADAPTER} to the folder "
            "of the unquantised model, which it is merged into and trained on with"
        )
    return found


def find_config_file(path: Path) -> Path | None:
    """The config.json in the folder ``path`` or, for a model folder, beside it."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, *([folder.parent] if folder.name == MODEL else [])):
        if (place / "config.json").is_file():
            return place / "config.json"
    return None


def _require_weights(path: Path) -> None:
    """Raise WeightsError for a folder without weights; the usual mistake is a parent folder."""
    if path.is_file() or not any(path.iterdir()) or holds_weights(path):
        return
    below = [f for folder in (path, path / "checkpoints") for f in folder.glob("*") if holds_weights(f)]
    hint = f". Did you mean {max(below)}?" if below else ""
    raise WeightsError(
        f"{path} holds no weights: give a Hugging Face folder ({', '.join(WEIGHT_FILES)}), NxD's shards, "
        f"Meta's download or a run's checkpoint{hint}"
    )


def holds_weights(folder: Path) -> bool:
    """Whether there is a file of weights in ``folder``, of any kind but Meta's."""
    return folder.is_dir() and (
        any((folder / name).is_file() for name in (*WEIGHT_FILES, "checkpoint.json"))
        or model_folder(folder) is not None
    )


def open_source(
    path: Path, config_file: Path | None = None, *, unequal_replicas: bool = False
) -> tuple[WeightSource, ModelShape]:
    """A reader for the weights at ``path``, and the model's shape.

    Raises WeightsError, ModelConfigError: nothing of a known kind, damaged, or of another shape than
    its configuration.
    """
    if is_peft_folder(path) and not holds_weights(path):
        return open_adapter(path)
    layout = layout_of(path)
    if layout == "meta":
        meta = MetaFolder(path, None if config_file is None else read_config_json(config_file))
        check_weights(meta, meta.config, hint=f"{PARAMS} must be that of the weights, or a shard is missing")
        return meta, meta.config
    if layout == "nxdt":
        file = config_file or find_config_file(path)
        if file is None:
            raise WeightsError(
                f"{path} has no config.json, and the sizes of heads do not follow from shards: give the "
                "model's config.json with --config"
            )
        if config_file is None:
            require_unchanged(file)
        config = read_config_json(file)
        sharded = NxDTFolder(path, config, untie=True, unequal_replicas=unequal_replicas)
        return sharded, sharded.config
    if path.is_dir() and not holds_weights(path) and (path / ARCHIVE).is_file():
        path = path / ARCHIVE
    _require_weights(path)
    file = config_file or find_config_file(path)
    if file is None:
        raise WeightsError(f"{path} has no config.json: give the model's with --config")
    model = read_model_json(file)
    folder = open_folder(path, model, file)
    check_weights(folder, model)
    return folder, model


def open_folder(path: Path, config: ModelShape, config_file: Path | None = None) -> WeightSource:
    """A reader of Hugging Face's files at ``path``."""
    if isinstance(config, DecoderConfig):
        return HFFolder(path, config_file)
    # Here, as they import transformers.
    from nxdt_align.models.backend.config import TransformersConfig
    from nxdt_align.weights.transformers_folder import TransformersFolder

    assert isinstance(config, TransformersConfig)
    return TransformersFolder(path, config)


def fresh_weights(model: ModelShape, seed: int) -> FreshWeights:
    """Random initial weights."""
    if isinstance(model, DecoderConfig):
        return FreshWeights(model, seed)
    from nxdt_align.models.backend.config import TransformersConfig
    from nxdt_align.weights.transformers_folder import FreshTransformers

    assert isinstance(model, TransformersConfig)
    return FreshTransformers(model, seed)


def check_weights(source: WeightSource, config: ModelShape, *, hint: str = _SIZES) -> None:
    """Raises WeightsError naming, as Hugging Face does, every weight that is missing, surplus or of another
    shape than the configuration's. Any dtype fits."""
    require_fit(
        source,
        {_hf_name(name, config): (source.shape(name), None) for name in source.names()},
        {_hf_name(name, config): (shape, None) for name, shape in weight_shapes(config).items()},
        error=WeightsError,
        hint=hint,
    )


def _hf_name(name: str, config: ModelShape) -> str:
    """With the part that it is of a fused tensor."""
    if not isinstance(config, DecoderConfig):
        return name
    try:
        theirs = to_hf(name, config.model_type)
    except UnknownNameError:  # in a checkpoint of another kind of model
        return name
    is_part = len(parts_of(theirs, config.model_type)) > 1
    return f"{theirs} ({name.split('.')[-2]})" if is_part else theirs
