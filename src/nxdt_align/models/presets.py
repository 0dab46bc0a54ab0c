"""The shapes of known Llamas, and a fresh weight of any; with ``models.config``'s names beside them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from nxdt_align.models.config import (
    DecoderConfig,
    ModelConfigError,
    ModelShape,
    RopeScaling,
    parameter_count,
    weight_shapes,
)
from nxdt_align.models.config_json import (
    Implementation,
    from_hf_dict,
    load_config_json,
    model_of,
    model_type_of,
    read_config_json,
    read_model_json,
)

__all__ = [
    "LLAMA3_1_8B",
    "LLAMA3_2_1B",
    "LLAMA3_8B",
    "PRESETS",
    "TINY",
    "DecoderConfig",
    "Implementation",
    "ModelConfigError",
    "ModelShape",
    "RopeScaling",
    "fresh_weight",
    "from_hf_dict",
    "load_config_json",
    "model_of",
    "model_type_of",
    "parameter_count",
    "read_config_json",
    "read_model_json",
    "weight_shapes",
]

LLAMA3_8B = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_id=128001,
)

LLAMA3_1_8B = replace(
    LLAMA3_8B,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    max_position_embeddings=131072,
)

LLAMA3_2_1B = DecoderConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    bos_token_id=128000,
    eos_token_id=128001,
)

TINY = DecoderConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
)
"""For tests."""

PRESETS = {
    "llama3_8b": LLAMA3_8B,
    "llama3_1_8b": LLAMA3_1_8B,
    "llama3_2_1b": LLAMA3_2_1B,
    "tiny": TINY,
}


def fresh_weight(config: DecoderConfig, name: str, seed: int) -> Tensor:
    """The untrained weight ``name``, float32 on the CPU: what changes nothing for a norm or a bias, else
    normal(0, initializer_range).

    Drawn from ``seed`` and ``name`` alone, so that neither device, order nor sharding changes it.
    """
    shape = weight_shapes(config)[name]
    if name.endswith("norm.weight"):
        return torch.full(shape, 1.0 - config.norm_offset, device="cpu", dtype=torch.float32)
    if name.endswith(".bias"):
        return torch.zeros(shape, device="cpu", dtype=torch.float32)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    weight = torch.empty(shape, device="cpu", dtype=torch.float32)
    return weight.normal_(0.0, config.initializer_range, generator=generator)
