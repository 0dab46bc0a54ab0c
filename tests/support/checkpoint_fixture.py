"""Weights and sizes for conversions, and a conversion in one call."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.models.presets import DecoderConfig
from nxdt_align.run.conversion import Report, convert
from nxdt_align.weights.digests import RECORD
from nxdt_align.weights.hf import FreshWeights, HFFolder

MakeHF = Callable[..., Path]
DOWN = "model.layers.0.mlp.down_proj.weight"
CONFIG = DecoderConfig(
    vocab_size=99,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=4,
    eos_token_id=(2, 7),
)
SIZES: dict[str, Any] = {"tp": 4, "pp": 2, "kv_multiplier": 2}


def fresh(config: DecoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    source = FreshWeights(replace(config, initializer_range=0.3), seed)
    return {name: source.read(name).to(dtype) for name in source.names()}


def run(source: Path, destination: Path, **options: Any) -> Report:
    return convert(source, destination, quiet=True, **options)


def random_config(rng: random.Random) -> DecoderConfig:
    kv_heads, group = rng.choice([1, 2, 3, 4, 6, 8]), rng.choice([1, 2, 3, 4, 6])
    return DecoderConfig(
        vocab_size=rng.randint(20, 70),
        hidden_size=rng.choice([8, 24]),
        intermediate_size=rng.choice([48, 96, 144]),
        num_hidden_layers=rng.randint(1, 5),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([2, 4, 6]),
        tie_word_embeddings=rng.random() < 0.3,
    )


def same_folders(one: Path, other: Path) -> None:
    first, second = HFFolder(one), HFFolder(other)
    assert first.names() == second.names()
    for name in first.names():
        a, b = first.read(name), second.read(name)
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def load(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


def edit(shard: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change a shard of a checkpoint, which then counts as one without checksums."""
    (shard.parent.parent / RECORD).unlink(missing_ok=True)
    tensors = load(shard)
    torch.save(change(tensors) or tensors, shard)
