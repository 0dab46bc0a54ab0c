"""Writes a Hugging Face folder that transformers loads, for exports and conversions.

A safetensors header fixes every tensor's position, so the files are created at full size and filled
afterwards: one whole weight at a time, in any order, from several threads. At most one weight is in memory,
and an interrupted write can be completed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.files import atomic_folder, explain
from nxdt_align.models.presets import DecoderConfig, ModelShape, weight_shapes
from nxdt_align.named_tensors import Spec, WeightSource, require_fit
from nxdt_align.weights.extents import BLOCK, Extent, WeightsError, write_bytes
from nxdt_align.weights.generation import GENERATION, generation_json
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.names import hf_tensors
from nxdt_align.weights.tensor_files import SAFETENSORS_DTYPES

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Maximum size of a file, transformers' default; larger models are split into several, with an index."""
_UNFINISHED_CONFIG = "config.json.partial"
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
"""Files that a tokenizer has one of."""
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's other templates, beside chat_template.jinja."""


def write_hf_folder(
    path: str | Path,
    config: ModelShape,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    tokenizer_dir: str | Path | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write config.json, generation_config.json, safetensors and the tokenizer's files; whole or not at all.

    Args:
        path: the folder to create. It must not exist or be empty, unless ``overwrite`` is set; then it is
            replaced when the new one is complete.
        tensors: every weight of the plain model once, whole, on any device; read one at a time.
        tokenizer_dir: whose tokenizer files to copy.
        generation: of generation_config.json; None takes the special tokens of ``config``.
        dtype: cast the weights to it, but for those that the model always has in float32. None keeps their
            dtypes, which must all be equal if ``tensors`` is an iterable of pairs.
        max_shard_bytes: larger models are split into several files with an index.

    Raises WeightsError: the folder exists, weights are missing, surplus or misshapen, the tokenizer
    folder has no tokenizer, or the disk refuses.
    """
    path = Path(path)
    _check_target(path, overwrite)
    tokenizer = None if tokenizer_dir is None else tokenizer_files(Path(tokenizer_dir))
    shapes = weight_shapes(config)
    if isinstance(tensors, Mapping):
        _require_fit(path, _specs(tensors), {name: (shape, None) for name, shape in shapes.items()})
        dtypes = {name: dtype or tensors[name].dtype for name in shapes}
        pairs = iter(tensors.items())
    else:
        pairs = iter(tensors)
        if dtype is None:
            # The header comes before the data, so all dtypes must be known when the first weight arrives.
            first = list(islice(pairs, 1))
            dtypes = dict.fromkeys(shapes, first[0][1].dtype if first else torch.float32)
            pairs = chain(first, pairs)
        else:
            dtypes = dict.fromkeys(shapes, dtype) | dict.fromkeys(config.float32_weights, torch.float32)
    wanted = {name: (shape, dtypes[name] if dtype is None else None) for name, shape in shapes.items()}
    try:
        with atomic_folder(path) as folder:
            writer = writer_for(config)(
                folder,
                config,
                dtypes.__getitem__,
                tokenizer=tokenizer,
                generation=generation,
                max_shard_bytes=max_shard_bytes,
            )
            writer.create()
            writer.open()
            found: dict[str, Spec] = {}
            for name, tensor in pairs:
                if name in found:
                    raise WeightsError(f"{name} came twice for {path}")
                found |= _specs({name: tensor})
                if tuple(tensor.shape) == shapes.get(name):
                    writer.write(name, tensor.detach().to("cpu", dtypes[name]).contiguous())
                del tensor  # before the next one is gathered
            _require_fit(path, found, wanted)
            writer.finish()
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {explain(error)}") from error


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise WeightsError(f"{path} exists already: choose another folder, remove it, or ask to overwrite it")
    if not (path / "config.json").is_file():
        raise WeightsError(
            f"{path} is not a model folder (no config.json) and is not overwritten: choose another"
        )


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files in ``folder``, by their names in it. Raises WeightsError where there is no
    tokenizer."""
    if not holds_tokenizer(folder):
        raise WeightsError(f"{folder} has no tokenizer: it must hold tokenizer.json or tokenizer.model")
    templates = (f"{_TEMPLATES}/{file.name}" for file in sorted((folder / _TEMPLATES).glob("*.jinja")))
    names = (*_VOCABULARIES, *_TOKENIZER_FILES, *templates)
    return {name: folder / name for name in names if (folder / name).is_file()}


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy them to these names in ``folder``. Raises OSError."""
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _require_fit(path: Path, found: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> None:
    require_fit(
        f"what is written to {path}",
        found,
        wanted,
        error=WeightsError,
        hint="Every weight of the model configuration is written once, whole",
    )


def writer_for(config: ModelShape) -> type[HFWriter]:
    """What writes a folder of such a model."""
    if isinstance(config, DecoderConfig):
        return HFWriter
    # Here, as it imports transformers.
    from nxdt_align.weights.transformers_writer import TransformersWriter

    return TransformersWriter


Tables = tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype], dict[str, list[str]]]


class HFWriter:
    """The files of one folder. Without ``finish`` it has no config.json, so that nothing loads it.

    Args:
        dtype: the dtype of each weight, by the plain model's name.
        tokenizer: files to copy, as of ``tokenizer_files``.
        generation: of generation_config.json; None takes the special tokens of ``config``.
        max_shard_bytes: a larger model is spread over several files with an index.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelShape,
        dtype: Callable[[str], torch.dtype],
        *,
        tokenizer: Mapping[str, Path] | None = None,
        generation: Mapping[str, Any] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self._config, self._tokenizer = config, tokenizer or {}
        self._generation = generation_json(config) if generation is None else dict(generation)
        self._shapes, self._dtypes, self._tensors = self._tables(dtype)
        unknown = sorted({str(d) for d in self._dtypes.values() if d not in _DTYPE_NAMES})
        if unknown:
            raise WeightsError(f"safetensors holds no {', '.join(unknown)}: choose another with --dtype")
        for theirs, parts in self._tensors.items():
            kinds = sorted({str(self._dtypes[part]) for part in parts})
            if len(kinds) > 1:
                raise WeightsError(
                    f"{' and '.join(parts)} become one tensor, {theirs}, but are {' and '.join(kinds)}; "
                    "choose one: --dtype"
                )
        self._shards = self._spread(max_shard_bytes)
        self._places: dict[str, Extent] = {}

    def _tables(self, dtype: Callable[[str], torch.dtype]) -> Tables:
        """Of what is written: shape and dtype of each part, and the parts that lie one behind the other in
        each tensor of the files, by its name."""
        assert isinstance(self._config, DecoderConfig)
        shapes = weight_shapes(self._config)
        return shapes, {name: dtype(name) for name in shapes}, hf_tensors(self._config)

    def total_bytes(self) -> int:
        return sum(self._nbytes(name) for name in self._dtypes)

    def create(self) -> None:
        """Create every file at full size, as sparse files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, tensors in self._shards.items():
            header, size = self._header(tensors)
            path = self.folder / file
            path.write_bytes(header)
            os.truncate(path, len(header) + size)
        if len(self._shards) > 1:
            weight_map = {theirs: file for file, tensors in self._shards.items() for theirs in tensors}
            sizes = {"total_size": self.total_bytes()}
            index = {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index)
        dtypes = self._stored_dtypes()
        stored = dtypes[0]
        for dtype in dtypes:
            stored = torch.promote_types(stored, dtype)
        write_json(self.folder / _UNFINISHED_CONFIG, config_json(self._config, stored))

    def _stored_dtypes(self) -> list[torch.dtype]:
        """Those that decide what config.json says."""
        return list(self._dtypes.values())

    def open(self) -> None:
        """Locate the tensors in the files of ``create``, also in those of an earlier attempt."""
        for file, tensors in self._shards.items():
            offset = len(self._header(tensors)[0])
            # Parts of a fused tensor lie one behind the other, as they are stacked on dimension 0.
            for name in (part for theirs in tensors for part in self._tensors[theirs]):
                shape = self._shapes[name]
                self._places[name] = Extent(self.folder / file, offset, self._dtypes[name], shape)
                offset += self._nbytes(name)

    def write(self, name: str, whole: Tensor) -> None:
        """Write a weight at its position. Raises OSError."""
        place = self._places[name]
        write_bytes(place.path, place.offset, whole)

    def reopen(self) -> WeightSource:
        """A reader of what was written."""
        return HFFolder(self.folder, self.folder / _UNFINISHED_CONFIG)

    def finish(self, record: Mapping[str, Any] | None = None) -> None:
        """Complete the folder; this layout stores no record."""
        write_json(self.folder / GENERATION, self._generation)
        copy_files(self._tokenizer, self.folder)
        os.rename(self.folder / _UNFINISHED_CONFIG, self.folder / CONFIG)

    def unfinish(self) -> None:
        """Undo an interrupted ``finish``."""
        if (self.folder / CONFIG).exists():
            os.rename(self.folder / CONFIG, self.folder / _UNFINISHED_CONFIG)

    def description(self) -> dict[str, Any]:
        """Identifies the output, to compare two conversions."""
        dtypes = sorted({str(dtype) for dtype in self._dtypes.values()})
        files = {file: len(tensors) for file, tensors in self._shards.items()}
        return {"layout": "hf", "config": self._config.to_hf_dict(), "dtypes": dtypes, "files": files}

    def _nbytes(self, name: str) -> int:
        return prod(self._shapes[name]) * self._dtypes[name].itemsize

    def _spread(self, most: int) -> dict[str, list[str]]:
        """File -> the names of its tensors, as Hugging Face has them."""
        groups: list[list[str]] = []
        held = 0
        for theirs, parts in self._tensors.items():
            size = sum(map(self._nbytes, parts))
            if not groups or held + size > most:
                groups.append([])
                held = 0
            groups[-1].append(theirs)
            held += size
        # Wide dtypes first, as safetensors does: every tensor then starts at a multiple of its itemsize.
        groups = [sorted(group, key=lambda theirs: -self._dtype_of(theirs).itemsize) for group in groups]
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        total = len(groups)
        return {f"model-{i + 1:05d}-of-{total:05d}.safetensors": group for i, group in enumerate(groups)}

    def _dtype_of(self, theirs: str) -> torch.dtype:
        return self._dtypes[self._tensors[theirs][0]]

    def _header(self, tensors: list[str]) -> tuple[bytes, int]:
        """The start of a safetensors file, up to its tensors, and the size of these."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        shapes = self._shapes
        for theirs in tensors:
            parts = self._tensors[theirs]
            stop = offset + sum(map(self._nbytes, parts))
            shape = [sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:]]
            dtype = _DTYPE_NAMES[self._dtype_of(theirs)]
            entries[theirs] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        # The format allows trailing spaces in the header: they align the first tensor to a block.
        text += b" " * (-(8 + len(text)) % BLOCK)
        return len(text).to_bytes(8, "little") + text, offset


def config_json(config: ModelShape, dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json of a folder whose weights are ``dtype``."""
    # transformers 4 reads torch_dtype, transformers 5 this or dtype.
    return config.to_hf_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
