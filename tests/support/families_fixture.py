"""A tiny model of each family that the decoder covers, with everything about it that can be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig, from_hf_dict

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # of a token that pads, transformers has no gradient
}
GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "sliding_window": 40,
    "tie_word_embeddings": True,
}

VALUES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 40, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", "sliding_window": 40},
    "phi3, partial": {"model_type": "phi3", "partial_rotary_factor": 0.5},
    "olmo2": {"model_type": "olmo2"},
    "gemma2": {
        **GEMMA,
        "model_type": "gemma2",
        # Low, so that both show at the size of these scores and logits.
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {
        **GEMMA,
        "model_type": "gemma3_text",
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
"""Keys of ``config.json`` beside BASE."""
CONFIGS: dict[str, DecoderConfig] = {name: from_hf_dict(BASE | values) for name, values in VALUES.items()}
WINDOW = 40


def window(config: DecoderConfig, size: int) -> DecoderConfig:
    """With a window of that size, where there is one."""
    return config if config.sliding_window is None else replace(config, sliding_window=size)


@torch.no_grad()
def draw(model: Decoder, seed: int, std: float) -> None:
    """Values of which each counts: of norms, around what changes nothing, and of biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        is_norm = name.endswith("norm.weight")
        parameter.copy_(noise + (1.0 - model.config.norm_offset if is_norm else 0.0))
