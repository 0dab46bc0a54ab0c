"""What a checkpoint is, in plain values for people and programs."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from nxdt_align.models.presets import LlamaConfig
from nxdt_align.named_tensors import WeightSource, summary
from nxdt_align.weights.bare_shards import describe_shards
from nxdt_align.weights.nxdt import NxDTFolder

_LAYOUTS = {
    "hf": "Hugging Face",
    "nxdt": "NxD (NxD Training)",
    "meta": "Meta's original download",
    "native": "nxdt-align's native engine (DCP)",
}
_LOADERS = {
    "hf": "transformers; nxdt-align (resume_from_checkpoint)",
    "nxdt": "NxD Training at the same sizes; nxdt-align at any (resume_from_checkpoint)",
    "meta": "nxdt-align convert",
    "native": "nxdt-align's native engine (resume_from_checkpoint)",
}


def describe(path: Path, source: WeightSource, config: LlamaConfig, layout: str) -> dict[str, Any]:
    """Layout, sizes, dtypes, parameter count, names and loaders of an opened checkpoint."""
    names = source.names()
    dtypes = Counter(str(source.dtype(name)).removeprefix("torch.") for name in names)
    found = {
        **_place(path, layout),
        "parameters": sum(prod(source.shape(name)) for name in names),
        "dtypes": dict(sorted(dtypes.items())),
        "model": {
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "query heads": config.num_attention_heads,
            "kv heads": config.num_key_value_heads,
            "head dim": config.head_dim,
            "intermediate size": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "tied head": config.tie_word_embeddings,
        },
    }
    if isinstance(source, NxDTFolder):
        found["shards"] = _shards(source)
    return found | {"weights": summary(names)}


def describe_bare(path: Path) -> dict[str, Any]:
    """What shards tell without a config.json. Raises WeightsError where some are missing or damaged."""
    return _place(path, "nxdt") | describe_shards(path)


def to_text(description: dict[str, Any]) -> str:
    """The description in lines for a terminal."""
    lines = []
    for key, value in description.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items())
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  {entry}" for entry in value)]
        else:
            lines.append(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
    return "\n".join(lines)


def _place(path: Path, layout: str) -> dict[str, Any]:
    return {
        "path": str(path),
        "layout": _LAYOUTS[layout],
        "loaded by": _LOADERS[layout],
        "bytes on disk": _bytes(path),
    }


def _shards(source: NxDTFolder) -> dict[str, Any]:
    held, last = source.partition, source.config.num_hidden_layers - 1
    return {
        "tensor parallel": held.tp,
        "pipeline parallel": held.pp,
        "layers of the stages": [end - start for start, end in pairwise([-1, *held.stage_ends, last])],
        "kv multiplier": held.kv_multiplier,
        "qkv": held.qkv,
        "files": "xser" if source.is_xser else "plain",
        "padded vocabulary": held.padded_vocab,
    }


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files)
