"""The small models that the demo trains: a Llama, and one of each other family with what sets it apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY_MULTIPLE = 64
"""The model's vocabulary is a multiple of this, so that it splits under tensor parallel."""
MAX_POSITIONS = 128
LLAMA = "llama"
WINDOW = 16
"""Tokens that a layer with a window sees: fewer than an instruction with its answer has."""

_GEMMA: Mapping[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
}
_GEMMA3: Mapping[str, Any] = {
    **_GEMMA,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window_pattern": 3,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    LLAMA: {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": WINDOW,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "gemma2": {**_GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
    "gemma3": _GEMMA3,
    "gemma": _GEMMA3,
}
"""``make demo MODEL=...`` -> what its ``config.json`` has beside sizes."""


def model_config(model: str, vocabulary: int, bos: int, eos: int, pad: int) -> dict[str, Any]:
    """``config.json`` of a model with 0.7 million parameters, a key of ``MODELS``."""
    return {
        "vocab_size": -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "float32",
        **MODELS[model],
    }
