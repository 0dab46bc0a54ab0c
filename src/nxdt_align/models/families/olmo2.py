"""OLMo 2: norms after attention and MLP instead of before, and norms over all heads of q and of k
(https://arxiv.org/abs/2501.00656)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nxdt_align.models.families.base import Family, attention_bias
from nxdt_align.models.fields import Fields


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    return attention_bias(fields)


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
)
