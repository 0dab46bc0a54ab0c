"""OLMo 2: norms after attention and MLP instead of before, and norms over all heads of q and of k
(https://arxiv.org/abs/2501.00656)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nxdt_align.models.families.base import Family, attention_bias
from nxdt_align.models.fields import Fields


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    return attention_bias(fields)


_SIZES: Mapping[str, Mapping[str, Any]] = {
    "allenai/OLMo-2-1124-7B-SFT": {
        "vocab_size": 100352,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-06,
        "eos_token_id": 100257,
        "pad_token_id": 100277,
    },
}

OLMO2 = Family(
    "Olmo2ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 50279,
    },
    traits={"norms": "after", "qk_norm": "projection"},
    read=_read,
    only={"mlp_bias": False},
    modules={
        "self_attn.q_projection_norm": "self_attn.q_norm",
        "self_attn.k_projection_norm": "self_attn.k_norm",
        "self_attn.q_norm": None,
        "self_attn.k_norm": None,
        "input_layernorm": None,
        "post_attention_layernorm": None,
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    sizes=_SIZES,
)
