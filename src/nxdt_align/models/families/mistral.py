"""Mistral: a Llama whose layers all have a window (https://arxiv.org/abs/2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nxdt_align.models.families.base import Family
from nxdt_align.models.fields import Fields

if TYPE_CHECKING:
    from nxdt_align.models.config import DecoderConfig


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    has_none = "sliding_window" in fields.values and fields.values["sliding_window"] is None
    return {"sliding_window": None if has_none else fields.integer("sliding_window", 4096)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


_7B: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
}
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _7B,
    "alignment-handbook/zephyr-7b-sft-full": _7B,
}

MISTRAL = Family(
    "MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    read=_read,
    write=_write,
    only={"attention_bias": False, "mlp_bias": False},
    sizes=_SIZES,
)
