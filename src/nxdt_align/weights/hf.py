"""Hugging Face model folders as a source of weights, and fresh weights as another. hf_writer.py is the
way back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.models.families import FAMILIES
from nxdt_align.models.presets import (
    DecoderConfig,
    ModelShape,
    fresh_weight,
    from_hf_dict,
    load_config_json,
    model_type_of,
    weight_shapes,
)
from nxdt_align.named_tensors import NamedTensors, WeightSource, summary
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.names import UnknownNameError, is_recomputed, parts_of, to_hf
from nxdt_align.weights.tensor_files import open_tensor_file

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them."""


class HFFolder(WeightSource):
    """The weights of a folder that transformers' ``save_pretrained`` wrote; tensors are read on demand.

    If its ``config.json`` ties the head to the embedding, a stored head is left out. Tensors that the family
    has fused are several weights here.

    Args:
        path: the folder, or one file of all weights (``pytorch_model.bin``, NxD's ``checkpoint.pt``).
        config_file: read instead of the ``config.json`` beside the weights.

    Raises WeightsError (or ModelConfigError for ``config.json``) for a folder that is not one, that
    is not whole, or that holds what no model of the family has.
    """

    path: Path

    def __init__(self, path: str | Path, config_file: Path | None = None) -> None:
        self.path = Path(path)
        folder = self.path.parent if self.path.is_file() else self.path
        if not folder.is_dir():
            raise WeightsError(
                f"{self.path} is not a folder: give a Hugging Face folder with config.json and weights"
            )
        if not any(folder.iterdir()):
            raise WeightsError(f"the folder {self.path} is empty: it must hold config.json and weights")
        # Raw values: a tied head is left out whether or not the rest of the config is supported.
        file, self._config = load_config_json(config_file or folder)
        self._model_type = model_type_of(self._config, where=str(file))
        family = FAMILIES[self._model_type]
        self._files = _by_our_name(self.path, find_tensors(self.path), self._model_type)
        self._rows = self._rows_of_parts(file) if family.fused else {}
        tied = self._config.get("tie_word_embeddings")
        if family.defaults.get("tie_word_embeddings", False) if tied is None else tied:
            self._drop_tied_head()

    def __str__(self) -> str:
        return f"the Hugging Face folder {self.path}"

    def names(self) -> list[str]:
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        shape, rows = self._file(name).shape(self._theirs(name)), self._rows.get(name)
        return shape if rows is None else (rows.stop - rows.start, *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self._file(name).dtype(self._theirs(name))

    def read(self, name: str) -> Tensor:
        if name in self._rows:
            return self.read_slice(name, [slice(0, size) for size in self.shape(name)])
        return self._file(name).read(self._theirs(name))

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        rows = self._rows.get(name)
        if rows is not None:
            start, stop, _ = region[0].indices(rows.stop - rows.start)
            region = [slice(rows.start + start, rows.start + stop), *region[1:]]
        return self._file(name).read_slice(self._theirs(name), region)

    def _file(self, name: str) -> NamedTensors:
        if name not in self._files:
            raise WeightsError(f"{self} has no weight {self._theirs(name)}")
        return self._files[name]

    def _theirs(self, name: str) -> str:
        return to_hf(name, self._model_type)

    def _rows_of_parts(self, config_file: Path) -> dict[str, slice]:
        """The rows of each weight that is a part of a fused tensor; sizes of heads follow from no file."""
        shapes = weight_shapes(from_hf_dict(self._config, where=str(config_file)))
        rows: dict[str, slice] = {}
        for theirs in {self._theirs(name) for name in self._files}:
            parts, row = parts_of(theirs, self._model_type), 0
            if len(parts) == 1:
                continue
            for part in parts:
                size = shapes[part][0] if part in shapes else 0
                rows[part] = slice(row, row + size)
                row += size
            held = self._files[parts[0]].shape(theirs)
            if parts[0] in shapes and held[:1] != (row,):
                raise WeightsError(
                    f"{self} does not fit {config_file}: {theirs} has the shape {list(held)}, but its parts "
                    f"({', '.join(part.rpartition('.')[0].rpartition('.')[2] for part in parts)}) have {row} "
                    "rows; num_attention_heads, num_key_value_heads and intermediate_size must be those of "
                    "the weights"
                )
        return rows

    def _drop_tied_head(self) -> None:
        if _HEAD not in self._files:
            return
        if _EMBEDDING in self._files and not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
            raise WeightsError(
                f"{self}: config.json says `tie_word_embeddings` true, but {_HEAD} and {_EMBEDDING} differ: "
                "set it to false, or remove one of the two"
            )
        del self._files[_HEAD]


class FreshWeights(WeightSource):
    """Random initial weights, float32, generated on demand from ``seed``."""

    def __init__(self, config: ModelShape, seed: int) -> None:
        self._config = config
        self.seed = seed
        self._shapes = weight_shapes(config)

    def __str__(self) -> str:
        return f"fresh weights (seed {self.seed})"

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        assert isinstance(self._config, DecoderConfig)
        return fresh_weight(self._config, name, self.seed)

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        """Generates the whole tensor: each random number depends on those before it."""
        return self.read(name)[tuple(region)]

    def fingerprint(self) -> str:
        """Computed from the generator's inputs, without generating the weights."""
        spread = getattr(self._config, "initializer_range", None)
        drawn_from = [self.seed, spread, sorted(self._shapes.items())]
        return hashlib.blake2b(json.dumps(["fresh", *drawn_from]).encode(), digest_size=16).hexdigest()


def find_tensors(folder: Path) -> dict[str, NamedTensors]:
    """Hugging Face's name -> the file that holds the tensor."""
    if folder.is_file():
        single = open_tensor_file(folder)
        return dict.fromkeys(single.names(), single)
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None and (folder / "policy.pt").is_file():
        raise WeightsError(
            f"{folder} is of the reference DPO implementation: nxdt-align convert {folder}/policy.pt "
            "DESTINATION --to hf --config CONFIG_JSON --tokenizer DIR makes a folder to start training from"
        )
    if found is None:
        raise WeightsError(f"{folder} has no weights: it must hold one of {', '.join(WEIGHT_FILES)}")
    if not found.endswith(".index.json"):
        file = open_tensor_file(folder / found)
        return dict.fromkeys(file.names(), file)
    weight_map = _read_index(folder / found)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise WeightsError(f"{folder / found} names files that are missing: {', '.join(missing)}")
    files = {shard: open_tensor_file(folder / shard) for shard in shards}
    _require_complete_index(folder / found, weight_map, files)
    return {name: files[shard] for name, shard in weight_map.items()}


def _require_complete_index(
    index: Path, weight_map: Mapping[str, str], files: Mapping[str, NamedTensors]
) -> None:
    """Raise WeightsError unless index and shards agree; else some are of another model or save."""
    held = {shard: set(file.names()) for shard, file in files.items()}
    absent = [name for name, shard in weight_map.items() if name not in held[shard]]
    if absent:
        shown = ", ".join(summary(absent))
        raise WeightsError(f"{index} names tensors that their files do not hold: {shown}")
    # transformers would silently ignore such a file, and the user may expect its weights.
    there = {file.name for file in index.parent.iterdir() if _is_shard_like(file.name, min(files))}
    surplus = sorted(there - set(files))
    if surplus:
        raise WeightsError(
            f"{index.parent} holds shards that {index.name} does not name: {', '.join(surplus[:5])}. They "
            "are surplus, of another model or an earlier save: remove them, or take the index of them all"
        )
    unnamed = [n for names in held.values() for n in names if n not in weight_map and not is_recomputed(n)]
    if unnamed:
        shown = ", ".join(summary(unnamed))
        raise WeightsError(
            f"{index} does not name tensors that its files hold: {shown}. Take the index of these files"
        )


def _is_shard_like(name: str, shard: str) -> bool:
    """Whether the two are files of one series, such as model-00001-of-00004.safetensors."""
    pattern = re.sub(r"\d+", r"\\d+", re.escape(shard))
    return re.search(r"\d", shard) is not None and re.fullmatch(pattern, name) is not None


def _read_index(path: Path) -> dict[str, str]:
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} must have a `weight_map` from tensor names to files")
    outside = [str(shard) for shard in weight_map.values() if not _is_plain_name(shard)]
    if outside:
        raise WeightsError(
            f"{path}: `weight_map` must name files of its own folder, but names {outside[0]!r}"
        )
    return weight_map


def _is_plain_name(shard: object) -> bool:
    return isinstance(shard, str) and Path(shard).name == shard


def _by_our_name(folder: Path, tensors: dict[str, NamedTensors], model_type: str) -> dict[str, NamedTensors]:
    files: dict[str, NamedTensors] = {}
    unknown = []
    for name, file in tensors.items():
        if is_recomputed(name):
            continue
        try:
            files |= dict.fromkeys(parts_of(name, model_type), file)
        except UnknownNameError:
            unknown.append(name)
    if unknown:
        raise WeightsError(
            f"{folder} holds tensors that no {FAMILIES[model_type].architecture} has: "
            f"{', '.join(summary(unknown))}. Give the folder of a model without adapters or quantisation, "
            "with its own config.json"
        )
    return files
