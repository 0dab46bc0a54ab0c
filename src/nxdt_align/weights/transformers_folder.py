"""Folders and fresh weights of models that transformers computes, as sources; see models.backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nxdt_align.models.backend.config import TransformersConfig, type_name
from nxdt_align.models.backend.files import FileNames
from nxdt_align.models.backend.model import build
from nxdt_align.named_tensors import WeightSource, summary
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf import FreshWeights, find_tensors


class TransformersFolder(WeightSource):
    """The weights of a folder that ``save_pretrained`` wrote, under the names that they have in the model.

    Tensors are read on demand; a weight that the file has in parts, such as the experts of a layer, is put
    together then.

    Args:
        path: the folder, or one file of all weights.

    Raises WeightsError for a folder that is not one, is not whole, or holds what the model does not have.
    """

    path: Path

    def __init__(self, path: str | Path, config: TransformersConfig) -> None:
        self.path = Path(path)
        self._config, self._names = config, FileNames(config)
        self._shapes = config.weight_shapes()
        self._tensors = find_tensors(self.path)
        self._sources, surplus = self._names.sources(self._tensors)
        if surplus:
            raise WeightsError(
                f"{self.path} holds tensors that no {type_name(config)} has: {', '.join(summary(surplus))}. "
                "Give the folder of a model without adapters or quantisation, with its own config.json"
            )
        self._require_equal_heads()

    def __str__(self) -> str:
        return f"the Hugging Face folder {self.path}"

    def names(self) -> list[str]:
        return sorted(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        tensors = self._of(name)
        if len(tensors) == 1 and tensors[0][1] is None:
            return self._tensors[tensors[0][0]].shape(tensors[0][0])
        shapes = {file: self._tensors[file].shape(file) for file, _ in tensors}
        written = self._names.written_shapes.get(name)
        # What is put together of the tensors that the mapping would write has the model's shape.
        return self._shapes[name] if shapes == written else tuple(self.read(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        file = self._of(name)[0][0]
        return self._tensors[file].dtype(file)

    def read(self, name: str) -> Tensor:
        return self._names.read(name, self._of(name), lambda file: self._tensors[file].read(file))

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        tensors = self._of(name)
        if len(tensors) == 1 and tensors[0][1] is None:
            return self._tensors[tensors[0][0]].read_slice(tensors[0][0], region)
        return self.read(name)[tuple(region)]

    def _of(self, name: str) -> list[tuple[str, str | None]]:
        if name not in self._sources:
            raise WeightsError(f"{self} has no weight {name}")
        return self._sources[name]

    def _require_equal_heads(self) -> None:
        """Raise WeightsError for a head in the file that differs from the embedding to which it is tied."""
        tied = self._names.tied_copies(self._tensors)
        for copy, name in tied.items():
            if name in self._sources and not torch.equal(self._tensors[copy].read(copy), self.read(name)):
                raise WeightsError(
                    f"{self}: config.json ties the head to the embedding, but {copy} and {name} differ: set "
                    "tie_word_embeddings to false, or remove one of the two"
                )


class FreshTransformers(FreshWeights):
    """Random initial weights as transformers draws them, float32, generated whole from ``seed``."""

    def __init__(self, config: TransformersConfig, seed: int) -> None:
        super().__init__(config, seed)
        self._model_config = config

    def read(self, name: str) -> Tensor:
        drawn: Tensor = self._drawn[name]
        return drawn

    @cached_property
    def _drawn(self) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = build(self._model_config, None, device="cpu")
        drawn: dict[str, Tensor] = model.state_dict()
        return {name: drawn[name] for name in self._shapes}
