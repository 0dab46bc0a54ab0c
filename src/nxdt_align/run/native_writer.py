"""A checkpoint of the native engine without optimizer state, written a weight at a time.

As engines/native/saving.py writes it, but for one file a weight where a rank has one file: weights are
written in any order, by several threads, and again after an interruption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from nxdt_align.engines.native.checkpoint import MODEL, SUMMARY, TENSORS, TRAINER, NativeCheckpoint
from nxdt_align.models.presets import LlamaConfig, weight_shapes
from nxdt_align.named_tensors import WeightSource
from nxdt_align.weights.destinations import Dtypes, rename_back

_UNFINISHED = f"{TENSORS}.partial"
_ARCHIVE = 4096
"""Bytes of a file beside its weight's, at most."""


class NativeDestination:
    """A folder that ``resume_from_checkpoint`` takes."""

    def __init__(self, config: LlamaConfig, dtypes: Dtypes) -> None:
        self._config, self._dtypes = config, dtypes

    def writer(self, staging: Path) -> NativeWriter:
        return NativeWriter(staging / _UNFINISHED, self._config, self._dtypes)

    def reopen(self, staging: Path) -> WeightSource:
        self.writer(staging).write_index()
        return NativeCheckpoint(staging, unfinished=_UNFINISHED)

    def finish(self, staging: Path, record: Mapping[str, Any]) -> None:
        writer = self.writer(staging)
        writer.write_index()
        os.rename(staging / _UNFINISHED, staging / TENSORS)
        torch.save({"extra": {}, "optimizer": None}, staging / TRAINER)
        (staging / "config.json").write_text(json.dumps(self._config.to_hf_dict(), indent=2) + "\n")
        files = [*sorted((staging / TENSORS).iterdir()), staging / TRAINER]
        said = {
            "step": 0,
            "parameters": sum(prod(shape) for shape in weight_shapes(self._config).values()),
            "dtypes": sorted({str(d).removeprefix("torch.") for d in writer.dtypes.values()}),
            "has_optimizer": False,
        }
        SUMMARY.write(staging, said, files)

    def restart(self, staging: Path) -> None:
        (staging / SUMMARY.name).unlink(missing_ok=True)
        rename_back(staging / TENSORS, staging / _UNFINISHED)


class NativeWriter:
    """The weights' files, and torch.distributed.checkpoint's index of them."""

    def __init__(self, folder: Path, config: LlamaConfig, dtypes: Dtypes) -> None:
        self._folder, self._config = folder, config
        self.dtypes = {name: dtypes(name) for name in weight_shapes(config)}

    def total_bytes(self) -> int:
        shapes = weight_shapes(self._config)
        return sum(prod(shapes[name]) * dtype.itemsize + _ARCHIVE for name, dtype in self.dtypes.items())

    def create(self) -> Iterator[Path]:
        self._folder.mkdir(parents=True, exist_ok=True)
        yield self._folder

    def open(self) -> None:
        """Files are opened as they are written."""

    def write(self, name: str, whole: Tensor) -> None:
        """Raises OSError."""
        if whole.untyped_storage().nbytes() != whole.nbytes:
            whole = whole.clone()  # torch saves all of the memory that a view is of
        with open(self._folder / self._file(name), "wb") as file:
            torch.save(whole.detach(), file)

    def write_index(self) -> None:
        """Once all weights are written."""
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        written = []
        for name, shape in weight_shapes(self._config).items():
            chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
            properties = TensorProperties(dtype=self.dtypes[name])
            entries[MODEL + name] = TensorStorageMetadata(properties, torch.Size(shape), [chunk])
            length = (self._folder / self._file(name)).stat().st_size
            index = MetadataIndex(MODEL + name, chunk.offsets)
            written.append(WriteResult(index, length, _StorageInfo(self._file(name), 0, length)))
        FileSystemWriter(self._folder).finish(Metadata(entries), [written])

    def description(self) -> dict[str, Any]:
        """What makes two conversions write the same."""
        dtypes = sorted({str(dtype) for dtype in self.dtypes.values()})
        return {"layout": "native", "config": self._config.to_hf_dict(), "dtypes": dtypes}

    def _file(self, name: str) -> str:
        return f"__0_{list(self.dtypes).index(name)}.distcp"
