"""Adapters as PEFT has them: a folder of ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from nxdt_align.files import atomic_folder, explain
from nxdt_align.models.adapters import (
    TRAINABLE,
    AdapterSpec,
    adapter_shapes,
    fresh_factor,
    is_adapter,
    merged_weight,
    row_norms,
)
from nxdt_align.models.families import FAMILIES
from nxdt_align.models.presets import DecoderConfig, ModelShape, weight_shapes
from nxdt_align.models.sharding import LORA_A, LORA_B, MAGNITUDE, START, TRAINED
from nxdt_align.named_tensors import NamedTensors, WeightSource, content_fingerprint, require_fit, summary
from nxdt_align.weights.convert import cast_checked
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.names import UnknownNameError, from_hf, to_hf
from nxdt_align.weights.tensor_files import open_tensor_file

SETTINGS = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_MERGE = "an adapter of a head or an embedding is not read: merge it with PEFT, and give that folder"
_THEIRS = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
_OF_OTHERS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "exclude_modules": (None,),
    "target_parameters": (None, []),
    "megatron_config": (None,),
}
"""PEFT's setting -> the values with which it computes what is computed here."""
VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "velora_config",
)
"""PEFT's settings that, where they are set, choose another computation or other tensors."""
_BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of PEFT's ``init_lora_weights`` that change nothing but the factors."""


def is_peft_folder(path: Path) -> bool:
    return path.is_dir() and (path / SETTINGS).is_file() and any((path / name).is_file() for name in TENSORS)


# Names


def theirs(name: str, config: ModelShape) -> str:
    """PEFT's name of an adapter's tensor. Raises UnknownNameError."""
    path, _, part = name.rpartition(".")
    if part.startswith(TRAINED):
        return _PREFIX + _hf(f"{path}.{part.removeprefix(TRAINED)}", config)
    return f"{_PREFIX}{_hf_module(path, config)}.{_THEIRS[part]}"


def _hf(name: str, config: ModelShape) -> str:
    """transformers' name of a weight, which is ours of a model that transformers computes."""
    return to_hf(name, config.model_type) if isinstance(config, DecoderConfig) else name


def _hf_module(path: str, config: ModelShape) -> str:
    return _hf(f"{path}.weight", config).removesuffix(".weight")


def _from_hf(name: str, config: ModelShape) -> str:
    return from_hf(name, config.model_type) if isinstance(config, DecoderConfig) else name


def ours(name: str, config: ModelShape) -> str:
    """Our name of a tensor in PEFT's file. Raises UnknownNameError."""
    own = name.removeprefix(_PREFIX).replace(".modules_to_save.default.", ".").replace(".default.", ".")
    for part, suffix in _THEIRS.items():
        path = own.removesuffix(f".{suffix}").removesuffix(f".{suffix}.weight")
        if path != own:
            return f"{_from_hf(f'{path}.weight', config).removesuffix('.weight')}.{part}"
    path, _, what = _from_hf(own, config).rpartition(".")
    return f"{path}.{TRAINED}{what}"


def require_peft_names(config: ModelShape, spec: AdapterSpec | None, what: str) -> None:
    """Raise WeightsError for adapters that PEFT has no names for.

    Args:
        spec: None for a folder of PEFT's, which has such names.
    """
    if not isinstance(config, DecoderConfig):
        if spec is not None:
            _refuse_names_of_experts(config, spec, what)
        return
    family = FAMILIES[config.model_type]
    if family.fused:
        # One pair of factors cannot adapt as several pairs do.
        raise WeightsError(
            f"{what}: transformers' {family.architecture} has q, k and v, gate and up in one "
            f"weight each ({', '.join(family.fused)}), and here each has an adapter of its own, which no "
            "PEFT folder can hold; exp_manager.export_hf=merged writes the whole model, and "
            "model.implementation=transformers trains adapters of the fused weights"
        )


def _refuse_names_of_experts(config: ModelShape, spec: AdapterSpec, what: str) -> None:
    """PEFT, since transformers 5 has a layer's experts in one tensor, takes what they were called before for
    that tensor, wherever it stands in ``target_modules``."""
    from nxdt_align.models.backend.config import TransformersConfig
    from nxdt_align.models.backend.files import FileNames

    assert isinstance(config, TransformersConfig)
    parts = (files for files in FileNames(config).written_shapes.values() if len(files) > 1)
    experts = {file.split(".")[-2] for files in parts for file in files}
    alike = sorted({path.rpartition(".")[2] for path in spec.targets} & experts)
    if alike:
        raise WeightsError(
            f"{what}: PEFT takes {', '.join(alike)} of a {config.model_type} for its experts, which have no "
            "adapters here, so that it would load the folder for other layers; exp_manager.export_hf=merged "
            f"writes the whole model, or leave {', '.join(alike)} out of target_modules"
        )


# Reading


class PeftFolder:
    """An adapter that PEFT, or this package, has saved for a model of this shape.

    Raises WeightsError for what is no LoRA adapter, an adapter that is computed otherwise than here, of
    another shape, or damaged.
    """

    def __init__(self, path: str | Path, config: ModelShape) -> None:
        self.path = Path(path)
        self._config = config
        self.settings = read_settings(self.path)
        require_peft_names(config, None, str(self.path))
        file = next((self.path / name for name in TENSORS if (self.path / name).is_file()), None)
        if file is None:
            raise WeightsError(
                f"{self.path} has {SETTINGS} but neither of {', '.join(TENSORS)}; copy it again"
            )
        self._file: NamedTensors = open_tensor_file(file)
        wrapped = [name.removeprefix(_PREFIX) for name in self._file.names() if ".base_layer." in name]
        if wrapped:
            raise WeightsError(f"{file} has {', '.join(summary(wrapped))} beside its factors; {_MERGE}")
        try:
            self._names = {ours(name, config): name for name in self._file.names()}
        except UnknownNameError as error:
            raise WeightsError(f"{file} does not fit the model: {error}") from error
        self.spec = self._spec(file)

    def __str__(self) -> str:
        return f"the PEFT adapter {self.path}"

    def read(self, name: str) -> Tensor:
        return self._file.read(self._names[name])

    def _spec(self, file: Path) -> AdapterSpec:
        """Of its tensors: its patterns would be read against another library's module names."""
        paths = {LORA_A: set[str](), LORA_B: set[str](), MAGNITUDE: set[str](), TRAINED: set[str]()}
        for name in self._names:
            path, _, part = name.rpartition(".")
            paths[TRAINED if part.startswith(TRAINED) else part].add(path)
        said, factors = self.settings, paths[LORA_A] | paths[LORA_B]
        linear = self._config.linear_layers()
        others = sorted(_hf_module(path, self._config) for path in factors - linear.sizes.keys())
        if others:
            raise WeightsError(
                f"{file} has factors of {', '.join(summary(others))}, but a {self._config.model_type} has no "
                f"such linear layer below its head: base_model_name_or_path in {SETTINGS} must lead to the "
                f"model that it was trained on; {_MERGE}"
            )
        if self._config.tie_word_embeddings and linear.embedding in paths[TRAINED]:
            raise WeightsError(
                f"{file} has {_hf_module(linear.embedding, self._config)} trained whole, but this model's "
                "head is tied to it, and merged weights and transformers could not tell the two apart: train "
                "the adapter without it in modules_to_save"
            )
        spec = AdapterSpec(
            targets=tuple(path for path in linear.sizes if path in factors),
            saved=tuple(path for path in linear.modules if path in paths[TRAINED]),
            transposed=tuple(path for path in linear.sizes if path in factors & linear.transposed),
            rank=int(_number(said, "r", 8)),
            alpha=_number(said, "lora_alpha", 8),
            dropout=_number(said, "lora_dropout", 0.0),
            rslora=bool(said.get("use_rslora")),
            dora=bool(said.get("use_dora")),
        )
        require_fit(
            file,
            {name: (self._file.shape(theirs_), None) for name, theirs_ in self._names.items()},
            {name: (shape, None) for name, shape in adapter_shapes(self._config, spec).items()},
            error=WeightsError,
            hint=f"It must be an adapter of this model's shape, and {SETTINGS} the one it was saved with",
        )
        return spec


def read_settings(folder: Path) -> dict[str, Any]:
    """Of a PEFT folder. Raises WeightsError for those of an adapter that is computed otherwise than here."""
    file = folder / SETTINGS
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError("it holds no settings")
    except (ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"{file} of a PEFT adapter cannot be read: {error}; copy it again") from error
    if said.get("peft_type") != "LORA":
        raise WeightsError(
            f"{file}: peft_type must be LORA, no other adapter is read, but is {said.get('peft_type')}"
        )
    for key, fine in _OF_OTHERS.items():
        if key in said and said[key] not in fine:
            raise WeightsError(f"{file}: {key} must be {fine[0]}, as adapters here are, but is {said[key]!r}")
    _require_plain_lora(file, said)
    return said


def _require_plain_lora(file: Path, said: Mapping[str, Any]) -> None:
    """Raise WeightsError for a variant of LoRA that PEFT computes otherwise, or on another base."""
    for key in VARIANTS:
        if said.get(key):
            raise WeightsError(
                f"{file}: {key} must not be set: PEFT computes such an adapter otherwise than LoRA. Where "
                "PEFT can merge it, give the merged folder"
            )
    start = said.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _BASE_KEPT:
        raise WeightsError(
            f"{file}: init_lora_weights is {start!r}, with which PEFT has changed the base's weights, too, "
            "so that the adapter does not belong to the model as it is on disk. Save it again by PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion, which makes LoRA of PiSSA, "
            "CorDA, OLoRA and LoRA-GA, or merge it with PEFT, and give that folder"
        )


def _number(said: Mapping[str, Any], key: str, default: float) -> float:
    value = said.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WeightsError(f"{SETTINGS}: {key} must be a number, but is {value!r}")
    return value


class Adapter(Protocol):
    """A trained adapter, by our names."""

    spec: AdapterSpec
    path: Path

    def read(self, name: str) -> Tensor: ...


class MergedWeights(WeightSource):
    """A base model with an adapter added in, and both apart, for an engine that trains the adapter.

    What the adapter changes is read in float32, so that it is rounded once, to what is asked for; ``dtype``
    is the base's, in which it is written where nothing else is asked for.
    """

    def __init__(self, base: WeightSource, adapter: Adapter) -> None:
        self.base, self.adapter, self.path = base, adapter, adapter.path

    def __str__(self) -> str:
        return f"{self.adapter} on {self.base}"

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def fingerprint(self) -> str:
        """Of the weights in the base's dtypes: stores and runs keep the key that they had."""
        if self._content is None:
            stored = ((name, self.read(name).to(self.dtype(name))) for name in sorted(self.names()))
            self._content = content_fingerprint(stored)
        return self._content

    def read(self, name: str) -> Tensor:
        path, _, what = name.rpartition(".")
        spec = self.adapter.spec
        if path in spec.saved and what in TRAINABLE:
            return self.adapter.read(f"{path}.{TRAINED}{what}").float()
        weight = self.base.read(name)
        if path not in spec.targets or what != "weight":
            return weight
        a, b = (self.adapter.read(f"{path}.{part}") for part in (LORA_A, LORA_B))
        magnitude = self.adapter.read(f"{path}.{MAGNITUDE}") if spec.dora else None
        is_transposed = path in spec.transposed
        return merged_weight(weight, a, b, magnitude, spec.scale, transposed=is_transposed)

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        return self.read(name)[tuple(region)]


class AdaptedWeights(WeightSource):
    """What an engine with adapters is filled from: a model's weights, and every tensor that the adapters add.

    Args:
        base: the frozen weights.
        seed: of fresh factors.
        start: the adapter that training starts from; None for a fresh one, which changes nothing.
    """

    def __init__(
        self,
        base: WeightSource,
        config: ModelShape,
        spec: AdapterSpec,
        seed: int,
        start: Adapter | None = None,
    ) -> None:
        self._base, self._spec, self._seed, self._start = base, spec, seed, start
        self._shapes = adapter_shapes(config, spec)
        self.path = base.path

    def __str__(self) -> str:
        return str(self._base) if self._start is None else f"{self._start} on {self._base}"

    def names(self) -> list[str]:
        return [*self._base.names(), *self._shapes]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._shapes else self._base.dtype(name)

    def read(self, name: str) -> Tensor:
        path, _, part = name.rpartition(".")
        if not is_adapter(name):
            # The original of what is trained whole is the reference's: the adapter's own, where there is one.
            if self._start is not None and path in self._spec.saved and part in TRAINABLE:
                return self._start.read(f"{path}.{TRAINED}{part}")
            return self._base.read(name)
        if self._start is not None:
            return self._start.read(f"{path}.{part.removeprefix(START)}")
        if part.startswith(TRAINED):
            return self._base.read(f"{path}.{part.removeprefix(TRAINED)}")
        if part == MAGNITUDE:
            return row_norms(self._base.read(f"{path}.weight"), transposed=path in self._spec.transposed)
        return fresh_factor(name, self._shapes[name], self._spec, self._seed)

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        if name in self._shapes or self._start is not None:
            return self.read(name)[tuple(region)]
        return self._base.read_slice(name, region)


# Writing


def merged(weights: Iterable[tuple[str, Tensor]], spec: AdapterSpec) -> Iterable[tuple[str, Tensor]]:
    """A model's weights with its adapters added in, float32 where there is one.

    Args:
        weights: base and adapters, sorted by name: a layer's factors come before its ``weight``.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in weights:
        path, _, what = name.rpartition(".")
        if what.startswith(TRAINED):
            yield f"{path}.{what.removeprefix(TRAINED)}", tensor
        elif is_adapter(name):
            if not what.startswith(START):
                held[name] = tensor
        elif what == "weight" and f"{path}.{LORA_A}" in held:
            a, b = held.pop(f"{path}.{LORA_A}"), held.pop(f"{path}.{LORA_B}")
            magnitude, is_transposed = held.pop(f"{path}.{MAGNITUDE}", None), path in spec.transposed
            yield name, merged_weight(tensor, a, b, magnitude, spec.scale, transposed=is_transposed)
        elif path not in spec.saved or what not in TRAINABLE:
            yield name, tensor


def write_peft_folder(
    path: str | Path,
    config: ModelShape,
    spec: AdapterSpec,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    base: str | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter as ``peft.PeftModel.from_pretrained`` takes it; whole or not at all.

    Args:
        tensors: the adapters' by our names, whole; others are left out.
        base: the model that it belongs to, for ``base_model_name_or_path``.

    Raises WeightsError: layers that PEFT has no names for, values too large for ``dtype``, or the disk
    refuses.
    """
    require_peft_names(config, spec, str(path))
    found = {
        theirs(name, config): cast_checked(name, tensor.detach().cpu(), dtype)
        for name, tensor in tensors
        if spec.trains(name)
    }
    try:
        with atomic_folder(Path(path)) as folder:
            text = json.dumps(_as_peft(config, spec, base), indent=2) + "\n"
            (folder / SETTINGS).write_text(text, encoding="utf-8")
            save_file(found, folder / TENSORS[0], metadata={"format": "pt"})
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {explain(error)}") from error


def _as_peft(config: ModelShape, spec: AdapterSpec, base: str | None) -> dict[str, Any]:
    def short(paths: Sequence[str]) -> list[str]:
        """Last names, where they mean these modules and no others; whole paths else."""
        names = {path.rpartition(".")[2] for path in paths}
        every = config.linear_layers().modules
        whole = [_hf_module(path, config) for path in paths]
        if {path for path in every if path.rpartition(".")[2] in names} != set(paths):
            return sorted(whole)
        return sorted({path.rpartition(".")[2] for path in whole})

    def short_ends() -> list[str]:
        """The same of modules to save, whose names PEFT takes for the end of any path, without a dot before
        it: ``norm`` would be ``input_layernorm`` too."""
        whole = {_hf_module(path, config) for path in spec.saved}
        weights = {_hf(name, config).rpartition(".")[0] for name in weight_shapes(config)}
        others = {
            ".".join(parts[:count])
            for parts in (path.split(".") for path in weights)
            for count in range(1, len(parts) + 1)
        } - whole
        names = ((path.rpartition(".")[2], path) for path in whole)
        return sorted(
            {path if any(other.endswith(name) for other in others) else name for name, path in names}
        )

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "bias": "none",
        "fan_in_fan_out": bool(spec.transposed),
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "target_modules": short(spec.targets),
        "modules_to_save": short_ends() or None,
    }
