"""Phi-3 and 4: fused weights in the file (https://arxiv.org/abs/2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nxdt_align.models.families.base import Family
from nxdt_align.models.fields import Fields

if TYPE_CHECKING:
    from nxdt_align.models.config import DecoderConfig


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": fields.integer("sliding_window", None)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


_SIZES: Mapping[str, Mapping[str, Any]] = {
    "microsoft/Phi-3-mini-4k-instruct": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "sliding_window": 2047,
    },
}

PHI3 = Family(
    "Phi3ForCausalLM",
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    read=_read,
    write=_write,
    only={"attention_bias": False, "mlp_bias": False, "resid_pdrop": 0, "embd_pdrop": 0},
    rope_types=("default",),
    partial_rotary=True,
    fused={
        "self_attn.qkv_proj": (
            "self_attn.qkv_proj.q_proj",
            "self_attn.qkv_proj.k_proj",
            "self_attn.qkv_proj.v_proj",
        ),
        "mlp.gate_up_proj": ("mlp.gate_up_proj.gate_proj", "mlp.gate_up_proj.up_proj"),
    },
    sizes=_SIZES,
)
