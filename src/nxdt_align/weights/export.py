"""Writes a Hugging Face model folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nxdt_align.files import atomic_folder, explain
from nxdt_align.models.presets import LlamaConfig, weight_shapes
from nxdt_align.named_tensors import summary
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.names import to_hf

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


def write_hf_folder(
    path: str | Path,
    config: LlamaConfig,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write config.json, generation_config.json, safetensors and the tokenizer's files; whole or not at all.

    Args:
        path: the folder to make. It must not exist, unless it is empty or ``overwrite`` is set; then it
            is replaced when the new one is complete.
        tensors: every weight of the plain Llama once, whole, on any device; read one shard at a time.
        tokenizer_dir: whose tokenizer files to copy.
        dtype: what the weights are cast to; theirs where not given.
        max_shard_bytes: a larger model is spread over several files with an index.

    Raises WeightsError: the folder exists, weights are missing, surplus or misshapen, the tokenizer
    folder has no tokenizer, or the disk refuses.
    """
    path = Path(path)
    _check_target(path, overwrite)
    tokenizer = [] if tokenizer_dir is None else tokenizer_files(Path(tokenizer_dir))
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    try:
        with atomic_folder(path) as folder:
            stored = _write_weights(folder, _cast(_checked(pairs, config), dtype), max_shard_bytes)
            _write_json(folder / "config.json", config_json(config, stored))
            _write_json(folder / "generation_config.json", generation_json(config))
            for file in folder.glob("*.safetensors"):
                # safetensors makes files that their owner alone can read.
                shutil.copymode(folder / "config.json", file)
            for file in tokenizer:
                shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {explain(error)}") from error
    except SafetensorError as error:
        raise WeightsError(f"cannot write {path}: {error}") from error


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise WeightsError(f"{path} exists already: choose another folder, remove it, or ask to overwrite it")
    if not (path / "config.json").is_file():
        raise WeightsError(
            f"{path} is not a model folder (no config.json) and is not overwritten: choose another"
        )


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in ``folder``. Raises WeightsError where there is no tokenizer."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise WeightsError(f"{folder} has no tokenizer: it must hold tokenizer.json or tokenizer.model")
    return files


def _checked(pairs: Iterable[tuple[str, Tensor]], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """The pairs as they come; raises WeightsError at the first that does not fit, and at the end for
    those that never came."""
    missing = weight_shapes(config)
    for name, tensor in pairs:
        if name not in missing:
            raise WeightsError(f"the model configuration has no weight {name}, or it came twice")
        expected = missing.pop(name)
        if tuple(tensor.shape) != expected:
            raise WeightsError(f"{name} must have shape {list(expected)}, but has {list(tensor.shape)}")
        yield name, tensor
    if missing:
        raise WeightsError("weights are missing for the export: " + ", ".join(summary(missing)))


def _cast(pairs: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in pairs:
        # A copy: an engine may hand over one buffer again and again.
        copy = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True)
        yield to_hf(name), copy.contiguous()


def _write_weights(
    folder: Path, pairs: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> torch.dtype | None:
    """Write the shards and, where there are several, their index. Returns the widest dtype stored."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    shard_bytes = total_bytes = 0
    stored: torch.dtype | None = None

    def flush() -> None:
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in pairs:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        stored = tensor.dtype if stored is None else torch.promote_types(stored, tensor.dtype)
    flush()
    _name_shards(folder, shards, total_bytes)
    return stored


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the parts their names, which hold the number of shards: known only now."""
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def config_json(config: LlamaConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json of a folder whose weights are ``dtype``."""
    # transformers 4 reads torch_dtype, 5 both.
    return config.to_hf_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}


def generation_json(config: LlamaConfig) -> dict[str, Any]:
    """generation_config.json: the special tokens."""
    ids = {key: config.to_hf_dict()[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {key: value for key, value in ids.items() if value is not None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
