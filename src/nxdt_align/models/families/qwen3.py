"""Qwen3: each head of q and k has a norm (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nxdt_align.models.families.base import Family, attention_bias
from nxdt_align.models.families.qwen2 import DEFAULTS, read_windows, write_windows
from nxdt_align.models.fields import Fields


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    return {**attention_bias(fields), **read_windows(fields, found)}


_SIZES: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-8B": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}

QWEN3 = Family(
    "Qwen3ForCausalLM",
    defaults={**DEFAULTS, "head_dim": 128},
    traits={"qk_norm": "head"},
    read=_read,
    write=write_windows,
    only={"mlp_bias": False},
    sizes=_SIZES,
)
