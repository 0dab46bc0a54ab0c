"""Llama 1 to 3 (https://arxiv.org/abs/2407.21783)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nxdt_align.models.families.base import Family, attention_bias
from nxdt_align.models.fields import Fields


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    return {**attention_bias(fields), "mlp_bias": fields.boolean("mlp_bias", False)}


LLAMA = Family("LlamaForCausalLM", read=_read)
