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
)
