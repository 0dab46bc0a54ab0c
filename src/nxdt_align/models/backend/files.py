"""A model's weights under the names and in the tensors of its checkpoints, by transformers' own mapping.

A checkpoint may have other names than the model has (GPT-2's without ``transformer.``), and other tensors:
the experts of a layer are one 3-D weight in the model, and a tensor each in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.backend.model import build, weight_shapes

Read = Callable[[str], Tensor]
"""A tensor of a checkpoint, by its name there."""


class FileNames:
    """How the weights of a model stand in its checkpoints."""

    def __init__(self, config: TransformersConfig) -> None:
        self._model = build(config, None)
        self._config = config
        self._shapes = weight_shapes(config)

    # Reading

    def sources(self, names: Iterable[str]) -> tuple[dict[str, list[tuple[str, str | None]]], list[str]]:
        """The model's name of each weight -> the tensors among ``names``, of a checkpoint, that it is made
        of, each with the pattern of the mapping that it matches; and the names that no weight is made of."""
        known: dict[str, Any] = {**self._model.state_dict(), **self._shapes}
        found: dict[str, list[tuple[str, str | None]]] = {}
        surplus = []
        prefix = self._model.base_model_prefix
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, *self._transforms, prefix, known)
            if target not in known and name in known:
                target, pattern = name, None
            if target in self._shapes:
                found.setdefault(target, []).append((name, pattern))
            elif not self.is_ignored(target, known):
                surplus.append(name)
        return found, surplus

    def is_ignored(self, name: str, known: Mapping[str, Any]) -> bool:
        """Whether a tensor that the model has no weight for may be in its checkpoints: a tied head's copy,
        what follows from the configuration, and what its class leaves out."""
        patterns = [*(self._model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
        # GPT-2 and its like once had their masks in their checkpoints.
        patterns.append(r"\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")
        return name in known or any(re.search(pattern, name) for pattern in patterns)

    def tied_copies(self, names: Iterable[str]) -> dict[str, str]:
        """Tensors among ``names`` that are a second time what a tied weight is, and that weight's name."""
        found = {}
        tied = {**(self._model.all_tied_weights_keys or {})}
        for name in names:
            target, _ = rename_source_key(
                name, *self._transforms, self._model.base_model_prefix, self._model.state_dict()
            )
            if target in tied and target not in self._shapes:
                found[name] = tied[target]
        return found

    def read(self, name: str, tensors: list[tuple[str, str | None]], read: Read) -> Tensor:
        """The weight ``name``, made of the ``sources`` of it."""
        (first, pattern), *_ = tensors
        if pattern is None:
            return read(first)
        converter: Any = deepcopy(self._converters[pattern])
        for source, matched in tensors:
            converter.add_tensor(name, source, matched, read(source))
        made = converter.convert(name, model=self._model, config=self._model.config)[name]
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole

    @cached_property
    def _transforms(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        every = get_model_conversion_mapping(self._model)
        renamings = [each for each in every if isinstance(each, WeightRenaming)]
        return renamings, [each for each in every if isinstance(each, WeightConverter)]

    @cached_property
    def _converters(self) -> dict[str, WeightConverter]:
        return {pattern: each for each in self._transforms[1] for pattern in each.source_patterns}

    # Writing

    def written(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by their names there, that the weight ``name`` becomes."""
        made: dict[str, Tensor] = revert_weight_conversion(self._model, {name: weight})
        return made

    @cached_property
    def written_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The model's name of each weight -> the tensors that it becomes, with their shapes."""
        with torch.device("meta"):
            return {
                name: {
                    file: tuple(tensor.shape)
                    for file, tensor in self.written(name, torch.empty(shape)).items()
                }
                for name, shape in self._shapes.items()
            }
