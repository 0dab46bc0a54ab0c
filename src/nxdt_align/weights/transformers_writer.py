"""Writes the folder of a model that transformers computes, in the tensors that it would write itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.backend.files import FileNames
from nxdt_align.named_tensors import WeightSource
from nxdt_align.weights.extents import write_bytes
from nxdt_align.weights.hf_writer import HFWriter, Tables
from nxdt_align.weights.transformers_folder import TransformersFolder


class TransformersWriter(HFWriter):
    """As HFWriter. A weight may become several tensors, such as those of each expert."""

    _names: FileNames

    def _tables(self, dtype: Callable[[str], torch.dtype]) -> Tables:
        model = cast(TransformersConfig, self._config)
        self._names = FileNames(model)
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for name, written in self._names.written_shapes.items():
            shapes |= written
            dtypes |= dict.fromkeys(written, dtype(name))
        self._exempt = {file for n in model.float32_weights for file in self._names.written_shapes[n]}
        return shapes, dtypes, {file: [file] for file in shapes}

    def _stored_dtypes(self) -> list[torch.dtype]:
        return [dtype for name, dtype in self._dtypes.items() if name not in self._exempt]

    def write(self, name: str, whole: Tensor) -> None:
        for file, tensor in self._names.written(name, whole).items():
            place = self._places[file]
            write_bytes(place.path, place.offset, tensor.contiguous())

    def reopen(self) -> WeightSource:
        return TransformersFolder(self.folder, cast(TransformersConfig, self._config))
