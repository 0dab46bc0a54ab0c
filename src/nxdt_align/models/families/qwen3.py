"""Qwen3: each head of q and k has a norm (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nxdt_align.models.families.base import Family, attention_bias
from nxdt_align.models.families.qwen2 import DEFAULTS, read_windows, write_windows
from nxdt_align.models.fields import Fields


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    return {**attention_bias(fields), **read_windows(fields, found)}


QWEN3 = Family(
    "Qwen3ForCausalLM",
    defaults={**DEFAULTS, "head_dim": 128},
    traits={"qk_norm": "head"},
    read=_read,
    write=write_windows,
    only={"mlp_bias": False},
)
