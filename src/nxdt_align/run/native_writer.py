"""A checkpoint of the native engine without optimizer state, written one weight at a time.

As engines/native/saving.py writes it, but with one file per weight instead of one per rank: weights are
written in any order, by several threads, and rewritten after an interruption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
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
from nxdt_align.models.presets import ModelShape, weight_shapes
from nxdt_align.named_tensors import WeightSource
from nxdt_align.weights.digests import FileDigest, write_record
from nxdt_align.weights.generation import GENERATION
from nxdt_align.weights.hf_writer import write_json

_UNFINISHED = f"{TENSORS}.partial"
_ARCHIVE = 4096
"""Upper bound on a file's bytes beyond its weight's."""


class NativeWriter:
    """The weights' files in a folder that ``resume_from_checkpoint`` takes, and DCP's index of them.

    Args:
        folder: the checkpoint's.
        dtype: the dtype of each weight, by name.
        generation: of generation_config.json, which an export brings along; None writes none.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelShape,
        dtype: Callable[[str], torch.dtype],
        *,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self._config, self._generation = folder, config, generation
        self._tensors = folder / _UNFINISHED
        self._dtypes = {name: dtype(name) for name in weight_shapes(config)}

    def total_bytes(self) -> int:
        shapes = weight_shapes(self._config)
        return sum(prod(shapes[name]) * dtype.itemsize + _ARCHIVE for name, dtype in self._dtypes.items())

    def create(self) -> None:
        self._tensors.mkdir(parents=True, exist_ok=True)

    def open(self) -> None:
        """Files are opened as they are written."""

    def write(self, name: str, whole: Tensor) -> None:
        """Raises OSError."""
        if whole.untyped_storage().nbytes() != whole.nbytes:
            whole = whole.clone()  # torch.save writes a view's whole storage
        with open(self._tensors / self._file(name), "wb") as file:
            torch.save(whole.detach(), file)

    def reopen(self) -> WeightSource:
        """What was written, read as the engine reads it."""
        self._write_index()
        return NativeCheckpoint(self.folder, unfinished=_UNFINISHED)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Complete the folder; the summary, which marks it as complete, is written last."""
        self._write_index()
        os.rename(self._tensors, self.folder / TENSORS)
        torch.save({"extra": {}, "optimizer": None}, self.folder / TRAINER)
        (self.folder / "config.json").write_text(json.dumps(self._config.to_record(), indent=2) + "\n")
        beside = [self.folder / "config.json"]
        if self._generation is not None:
            beside.append(self.folder / GENERATION)
            write_json(beside[-1], self._generation)
        # The checkpoint's own files have checksums in them.
        write_record(self.folder, record, {file.name: FileDigest.of(file) for file in beside})
        files = [*sorted((self.folder / TENSORS).iterdir()), self.folder / TRAINER]
        said = {
            "step": 0,
            "parameters": sum(prod(shape) for shape in weight_shapes(self._config).values()),
            "dtypes": sorted({str(d).removeprefix("torch.") for d in self._dtypes.values()}),
            "has_optimizer": False,
        }
        SUMMARY.write(self.folder, said, files)

    def unfinish(self) -> None:
        """Undo what an interrupted ``finish`` has done, all or some of it."""
        (self.folder / SUMMARY.name).unlink(missing_ok=True)
        if (self.folder / TENSORS).exists():
            os.rename(self.folder / TENSORS, self._tensors)

    def _write_index(self) -> None:
        """Once all weights are written."""
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        written = []
        for name, shape in weight_shapes(self._config).items():
            chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
            properties = TensorProperties(dtype=self._dtypes[name])
            entries[MODEL + name] = TensorStorageMetadata(properties, torch.Size(shape), [chunk])
            length = (self._tensors / self._file(name)).stat().st_size
            index = MetadataIndex(MODEL + name, chunk.offsets)
            written.append(WriteResult(index, length, _StorageInfo(self._file(name), 0, length)))
        FileSystemWriter(self._tensors).finish(Metadata(entries), [written])

    def description(self) -> dict[str, Any]:
        """Identifies the output, to compare two conversions."""
        dtypes = sorted({str(dtype) for dtype in self._dtypes.values()})
        return {"layout": "native", "config": self._config.to_hf_dict(), "dtypes": dtypes}

    def _file(self, name: str) -> str:
        return f"__0_{list(self._dtypes).index(name)}.distcp"
