"""Writes a Hugging Face folder a whole weight at a time, in any order and from several threads.

The safetensors format puts every tensor at a place that its header names, so the files are made at
their full size first and filled afterwards. ``export.write_hf_folder`` is the way for weights that
come in order from an engine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.models.presets import LlamaConfig, weight_shapes
from nxdt_align.weights.direct_io import BLOCK
from nxdt_align.weights.export import config_json, generation_json
from nxdt_align.weights.export import write_hf_folder as write_hf_folder
from nxdt_align.weights.extents import Extent, WeightsError, write_bytes
from nxdt_align.weights.names import to_hf
from nxdt_align.weights.tensor_files import SAFETENSORS_DTYPES

CONFIG, UNFINISHED_CONFIG = "config.json", "config.json.partial"
INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class HFWriter:
    """The files of one folder. Without ``finish`` it has no config.json, so that nothing loads it.

    Args:
        dtype: the dtype of each weight, by the plain Llama's name.
        max_shard_bytes: a larger model is spread over several files with an index.
    """

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        dtype: Callable[[str], torch.dtype],
        *,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.folder = folder
        self._config = config
        self._dtypes = {name: dtype(name) for name in weight_shapes(config)}
        unknown = sorted({str(d) for d in self._dtypes.values() if d not in _DTYPE_NAMES})
        if unknown:
            raise WeightsError(f"safetensors holds no {', '.join(unknown)}: choose another with --dtype")
        self._shards = self._spread(max_shard_bytes)
        self._places: dict[str, Extent] = {}

    def total_bytes(self) -> int:
        return sum(self._nbytes(name) for name in self._dtypes)

    def create(self) -> Iterator[Path]:
        """Make every file at its full size (holes, which take no space yet); yields each one made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, names in self._shards.items():
            header, size = self._header(names)
            path = self.folder / file
            path.write_bytes(header)
            os.truncate(path, len(header) + size)
            yield path
        if len(self._shards) > 1:
            weight_map = {to_hf(name): file for file, names in self._shards.items() for name in names}
            sizes = {"total_size": self.total_bytes()}
            index = {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(self.folder / INDEX, index)
        stored = next(iter(self._dtypes.values()))
        for dtype in self._dtypes.values():
            stored = torch.promote_types(stored, dtype)
        _write_json(self.folder / UNFINISHED_CONFIG, config_json(self._config, stored))
        _write_json(self.folder / "generation_config.json", generation_json(self._config))

    def open(self) -> None:
        """Find where the tensors are in files that ``create`` has made, now or before."""
        for file, names in self._shards.items():
            offset = len(self._header(names)[0])
            for name in names:
                shape = weight_shapes(self._config)[name]
                self._places[name] = Extent(self.folder / file, offset, self._dtypes[name], shape)
                offset += self._nbytes(name)

    def write(self, name: str, whole: Tensor) -> None:
        """Put a weight into its place. Raises OSError."""
        place = self._places[name]
        write_bytes(place.path, place.offset, whole)

    def description(self) -> dict[str, Any]:
        """What makes two conversions write the same."""
        dtypes = sorted({str(dtype) for dtype in self._dtypes.values()})
        files = {file: len(names) for file, names in self._shards.items()}
        return {"layout": "hf", "config": self._config.to_hf_dict(), "dtypes": dtypes, "files": files}

    def _nbytes(self, name: str) -> int:
        return prod(weight_shapes(self._config)[name]) * self._dtypes[name].itemsize

    def _spread(self, most: int) -> dict[str, list[str]]:
        groups: list[list[str]] = []
        held = 0
        for name in self._dtypes:
            if not groups or held + self._nbytes(name) > most:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += self._nbytes(name)
        # Wide dtypes first, so that every tensor starts at a multiple of its entries' size.
        groups = [sorted(group, key=lambda name: -self._dtypes[name].itemsize) for group in groups]
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        total = len(groups)
        return {f"model-{i + 1:05d}-of-{total:05d}.safetensors": names for i, names in enumerate(groups)}

    def _header(self, names: list[str]) -> tuple[bytes, int]:
        """A safetensors file up to its tensors, and the bytes of those."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            stop = offset + self._nbytes(name)
            shape = list(weight_shapes(self._config)[name])
            dtype = _DTYPE_NAMES[self._dtypes[name]]
            entries[to_hf(name)] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % BLOCK)
        return len(text).to_bytes(8, "little") + text, offset


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
