"""Gemma 3's text model: Gemma 2 with norms of q and k instead of soft caps, five local layers to each global
one, and a rotary base of their own (https://arxiv.org/abs/2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nxdt_align.models.families.base import FULL, SLIDING, Family, windows
from nxdt_align.models.families.gemma2 import DEFAULTS, MODULES, ONLY, TRAITS, read_gemma, write_gemma
from nxdt_align.models.fields import Fields

if TYPE_CHECKING:
    from nxdt_align.models.config import DecoderConfig


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    pattern = fields.integer("sliding_window_pattern", 6) or 6
    of_layers = windows(fields, found, lambda layer: SLIDING if (layer + 1) % pattern else FULL)
    return {**read_gemma(fields, (None, None)), **of_layers}


def _write(config: DecoderConfig) -> dict[str, Any]:
    """Transformers 4 has the local base in a key of its own; 5 has rotary settings for each kind of layer."""
    values = config.rotary_json()
    local = {"rope_theta": config.local_rope_theta, "rope_type": "default"}
    return write_gemma(config) | {
        "rope_local_base_freq": config.local_rope_theta,
        "rope_parameters": {FULL: values["rope_parameters"], SLIDING: local},
    }


# That of the text model, in the text_config of its config.json.
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "google/gemma-3-12b-it": {
        "vocab_size": 262208,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}

GEMMA3 = Family(
    "Gemma3ForCausalLM",
    defaults={**DEFAULTS, "max_position_embeddings": 131072},
    traits={**TRAITS, "qk_norm": "head"},
    read=_read,
    write=_write,
    only=ONLY,
    activation_key="hidden_activation",
    rope_theta=1e6,
    local_rope_theta=10000.0,
    modules=MODULES,
    sizes=_SIZES,
)
