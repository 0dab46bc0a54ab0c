"""Names of weights: Hugging Face's, and the plain Llama's, which have two more segments."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nxdt_align.errors import UserError

# Hugging Face                                      plain Llama
_TABLE = {
    "model.embed_tokens.weight":                      "model.embed_tokens.weight",
    "model.layers.*.input_layernorm.weight":          "model.layers.*.input_layernorm.weight",
    "model.layers.*.self_attn.q_proj.weight":         "model.layers.*.self_attn.qkv_proj.q_proj.weight",
    "model.layers.*.self_attn.k_proj.weight":         "model.layers.*.self_attn.qkv_proj.k_proj.weight",
    "model.layers.*.self_attn.v_proj.weight":         "model.layers.*.self_attn.qkv_proj.v_proj.weight",
    "model.layers.*.self_attn.o_proj.weight":         "model.layers.*.self_attn.o_proj.weight",
    "model.layers.*.post_attention_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
    "model.layers.*.mlp.gate_proj.weight":            "model.layers.*.mlp.gate_up_proj.gate_proj.weight",
    "model.layers.*.mlp.up_proj.weight":              "model.layers.*.mlp.gate_up_proj.up_proj.weight",
    "model.layers.*.mlp.down_proj.weight":            "model.layers.*.mlp.down_proj.weight",
    "model.norm.weight":                              "model.norm.weight",
    "lm_head.weight":                                 "lm_head.weight",
}  # fmt: skip
_INVERSE = {ours: theirs for theirs, ours in _TABLE.items()}

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_RECOMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class UnknownNameError(UserError):
    """A name that no weight of a plain Llama has."""


def from_hf(name: str) -> str:
    """The plain Llama's name of Hugging Face's ``name``. Raises UnknownNameError."""
    return _translate(name, _TABLE, "a Hugging Face Llama")


def to_hf(name: str) -> str:
    """Hugging Face's name of the plain Llama's ``name``. Raises UnknownNameError."""
    return _translate(name, _INVERSE, "the plain Llama")


def is_recomputed(hf_name: str) -> bool:
    """Whether the tensor follows from the configuration: rotary frequencies, stored in old files."""
    return _RECOMPUTED.search(hf_name) is not None


def _translate(name: str, table: Mapping[str, str], owner: str) -> str:
    match = _LAYER.match(name)
    found = table.get(_LAYER.sub("model.layers.*.", name))
    if found is None or ("*" in found) != (match is not None):
        raise UnknownNameError(f"{owner} has no weight named {name!r}")
    return found.replace("*", match[1]) if match else found
