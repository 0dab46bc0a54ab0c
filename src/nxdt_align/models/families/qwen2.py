"""Qwen2 and 2.5: biases of q, k and v; a window in the upper layers, where one is used
(https://arxiv.org/abs/2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nxdt_align.models.families.base import FULL, SLIDING, Family, windows, written_types
from nxdt_align.models.fields import Fields

if TYPE_CHECKING:
    from nxdt_align.models.config import DecoderConfig


DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}


def read_windows(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    """``use_sliding_window`` says whether ``sliding_window`` counts; then it does from a layer on."""
    if not fields.boolean("use_sliding_window", False):
        if SLIDING in (fields.values.get("layer_types") or ()):
            fields.fault("use_sliding_window", f"must be true where layer_types has {SLIDING}", False)
        return {}
    first = fields.integer("max_window_layers", 28)
    return windows(fields, found, lambda layer: SLIDING if layer >= (first or 0) else FULL)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    types = written_types(config)
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": types.index(SLIDING) if SLIDING in types else config.num_hidden_layers,
        "layer_types": types,
    }


_SIZES: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-7B-Instruct": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}

QWEN2 = Family(
    "Qwen2ForCausalLM",
    defaults=DEFAULTS,
    traits={"qkv_bias": True},
    read=read_windows,
    write=write_windows,
    only={"mlp_bias": False},
    sizes=_SIZES,
)
