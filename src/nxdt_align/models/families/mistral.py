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


MISTRAL = Family(
    "MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    read=_read,
    write=_write,
    only={"attention_bias": False, "mlp_bias": False},
)
