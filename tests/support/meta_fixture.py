"""Meta's download, made from known weights by undoing what Hugging Face's conversion does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoint_fixture import fresh
from torch import Tensor

from nxdt_align.models.presets import TINY, DecoderConfig
from nxdt_align.weights.meta import _LAYER, _TABLE

CONFIG = replace(
    TINY,
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    head_dim=4,
    rope_theta=500000.0,
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_id=128001,
)
PARAMS: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}


def metas_rows(weight: Tensor, heads: int) -> Tensor:
    """Row i of a head's first half to 2i, of its second half to 2i + 1."""
    half = weight.view(heads, 2, -1, weight.shape[1])
    return torch.stack((half[:, 0], half[:, 1]), 2).reshape(weight.shape)


def write_meta(folder: Path, config: DecoderConfig, shards: int, embedding_dim: int, **params: Any) -> None:
    folder.mkdir()
    weights = fresh(config)
    files: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for theirs, (ours, dim) in _TABLE.items():
        layers = range(config.num_hidden_layers) if _LAYER.match(theirs.replace("*", "0")) else [0]
        for i in layers:
            if (name := ours.replace("*", str(i))) not in weights:
                continue
            weight = weights[name]
            if ".q_proj" in name or ".k_proj" in name:
                weight = metas_rows(weight, len(weight) // config.head_dim)
            split = embedding_dim if theirs == "tok_embeddings.weight" else dim
            parts = [weight] * shards if split is None else list(weight.chunk(shards, split))
            for file, part in zip(files, parts, strict=True):
                file[theirs.replace("*", str(i))] = part.clone()
    for number, file in enumerate(files):
        file["rope.freqs"] = torch.ones(2)
        torch.save(file, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | {"rope_theta": 500000.0} | params))
