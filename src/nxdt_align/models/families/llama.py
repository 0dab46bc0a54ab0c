"""Llama 1 to 3 (https://arxiv.org/abs/2407.21783)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nxdt_align.models.families.base import Family, attention_bias
from nxdt_align.models.fields import Fields


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    return {**attention_bias(fields), "mlp_bias": fields.boolean("mlp_bias", False)}


_SCALING: Mapping[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3: Mapping[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_8B: Mapping[str, Any] = {
    **_LLAMA3,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": {**_8B, "max_position_embeddings": 8192},
    "meta-llama/Meta-Llama-3-8B-Instruct": {**_8B, "max_position_embeddings": 8192},
    "meta-llama/Llama-3.1-8B": {**_8B, "max_position_embeddings": 131072, "rope_scaling": _SCALING},
    "meta-llama/Llama-3.1-70B-Instruct": {
        **_LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "max_position_embeddings": 131072,
        "rope_scaling": _SCALING,
    },
    "meta-llama/Llama-3.2-1B-Instruct": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "max_position_embeddings": 131072,
        "rope_scaling": {**_SCALING, "factor": 32.0},
        "tie_word_embeddings": True,
    },
}

LLAMA = Family(
    "LlamaForCausalLM",
    read=_read,
    sizes=_SIZES,
)
