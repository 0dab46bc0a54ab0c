"""Each rank's shard, used as NxD's layers use it, gives the logits of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import run
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from nxdt_align.models.presets import TINY, DecoderConfig
from nxdt_align.weights.nxdt_files import shard_name

IDS = torch.tensor([[1, 17, 90, 33, 4, 121]])
CONFIG = replace(TINY, num_attention_heads=8, num_key_value_heads=2, head_dim=4, num_hidden_layers=3)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """(B, N, S, H), pairs (i, i + H/2)."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1) * sin


def attention(x: Tensor, shard: dict[str, Tensor], prefix: str, config: DecoderConfig) -> Tensor:
    """One rank's part of the layer's output; query i uses kv i // (queries / kvs), as NxDT computes it."""
    q, k, v = (shard[f"{prefix}.qkv_proj.weight_{kind}"] for kind in "qkv")
    heads = [(x @ w.t()).view(1, x.shape[1], -1, config.head_dim).transpose(1, 2) for w in (q, k, v)]
    q, k = rotate(heads[0], config.rope_theta), rotate(heads[1], config.rope_theta)
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, heads[2]))
    out = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return out @ shard[f"{prefix}.o_proj.weight"].t()


def mlp(x: Tensor, shard: dict[str, Tensor], prefix: str) -> Tensor:
    gate, up = (x @ shard[f"{prefix}.gate_up_proj.weight"].t()).chunk(2, -1)
    return (silu(gate) * up) @ shard[f"{prefix}.down_proj.weight"].t()


def embed(shards: list[dict[str, Tensor]]) -> Tensor:
    """Vocabulary-parallel: the rank that holds a token's row gives it, the others 0."""
    rows = [shard["model.embed_tokens.weight"] for shard in shards]
    per = len(rows[0])
    parts = [table[(IDS - i * per).clamp(0, per - 1)] for i, table in enumerate(rows)]
    owner = IDS // per
    return torch.stack([torch.where((owner == i)[..., None], p, 0) for i, p in enumerate(parts)]).sum(0)


def sharded_logits(stages: list[list[dict[str, Tensor]]], config: DecoderConfig) -> Tensor:
    x = embed(stages[0])
    for shards in stages:
        layers = sorted({int(name.split(".")[2]) for name in shards[0] if ".layers." in name})
        for layer in (f"model.layers.{i}" for i in layers):
            y = norm(x, shards[0][f"{layer}.input_layernorm.weight"], config.rms_norm_eps)
            x = x + torch.stack([attention(y, s, f"{layer}.self_attn", config) for s in shards]).sum(0)
            y = norm(x, shards[0][f"{layer}.post_attention_layernorm.weight"], config.rms_norm_eps)
            x = x + torch.stack([mlp(y, s, f"{layer}.mlp") for s in shards]).sum(0)
    x = norm(x, stages[-1][0]["model.norm.weight"], config.rms_norm_eps)
    return torch.cat([x @ shard["lm_head.weight"].t() for shard in stages[-1]], -1)


@pytest.mark.parametrize(
    ("tp", "pp", "multiplier"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 3, 2), (8, 1, 4), (4, 1, 4)]
)
@pytest.mark.parametrize("vocab", [128, 125])
def test_logits_of_the_shards(tp: int, pp: int, multiplier: int, vocab: int, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = replace(CONFIG, vocab_size=vocab)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(transformers.AutoConfig.for_model(**config.to_hf_dict()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "out", tp=tp, pp=pp, kv_multiplier=multiplier, qkv_linear=True)
    folder = tmp_path / "out" / "model"
    stages = [
        [torch.load(folder / shard_name(t, p), weights_only=True) for t in range(tp)] for p in range(pp)
    ]
    found = sharded_logits(stages, config)[..., :vocab]
    torch.testing.assert_close(found, model(IDS).logits, rtol=1e-5, atol=1e-5)
