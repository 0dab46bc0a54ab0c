"""Names of weights: Hugging Face's, family by family, and the plain model's, which have two more segments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from nxdt_align.errors import UserError
from nxdt_align.models.families import FAMILIES
from nxdt_align.models.presets import DecoderConfig, weight_shapes

# The plain model                                     Hugging Face
_TABLE = {
    "model.embed_tokens.weight":                         "model.embed_tokens.weight",
    "model.layers.*.input_layernorm.weight":             "model.layers.*.input_layernorm.weight",
    "model.layers.*.self_attn.qkv_proj.q_proj.weight":   "model.layers.*.self_attn.q_proj.weight",
    "model.layers.*.self_attn.qkv_proj.k_proj.weight":   "model.layers.*.self_attn.k_proj.weight",
    "model.layers.*.self_attn.qkv_proj.v_proj.weight":   "model.layers.*.self_attn.v_proj.weight",
    "model.layers.*.self_attn.qkv_proj.q_proj.bias":     "model.layers.*.self_attn.q_proj.bias",
    "model.layers.*.self_attn.qkv_proj.k_proj.bias":     "model.layers.*.self_attn.k_proj.bias",
    "model.layers.*.self_attn.qkv_proj.v_proj.bias":     "model.layers.*.self_attn.v_proj.bias",
    "model.layers.*.self_attn.o_proj.weight":            "model.layers.*.self_attn.o_proj.weight",
    "model.layers.*.self_attn.o_proj.bias":              "model.layers.*.self_attn.o_proj.bias",
    "model.layers.*.self_attn.q_norm.weight":            "model.layers.*.self_attn.q_norm.weight",
    "model.layers.*.self_attn.k_norm.weight":            "model.layers.*.self_attn.k_norm.weight",
    "model.layers.*.post_attention_layernorm.weight":    "model.layers.*.post_attention_layernorm.weight",
    "model.layers.*.mlp.gate_up_proj.gate_proj.weight":  "model.layers.*.mlp.gate_proj.weight",
    "model.layers.*.mlp.gate_up_proj.up_proj.weight":    "model.layers.*.mlp.up_proj.weight",
    "model.layers.*.mlp.gate_up_proj.gate_proj.bias":    "model.layers.*.mlp.gate_proj.bias",
    "model.layers.*.mlp.gate_up_proj.up_proj.bias":      "model.layers.*.mlp.up_proj.bias",
    "model.layers.*.mlp.down_proj.weight":               "model.layers.*.mlp.down_proj.weight",
    "model.layers.*.mlp.down_proj.bias":                 "model.layers.*.mlp.down_proj.bias",
    "model.norm.weight":                                 "model.norm.weight",
    "lm_head.weight":                                    "lm_head.weight",
}  # fmt: skip
"""Where a family says nothing else."""

_ANY = "model.layers.*."
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_RECOMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class UnknownNameError(UserError):
    """A name that no weight of the family has."""


def from_hf(name: str, model_type: str = "llama") -> str:
    """The plain model's name of Hugging Face's ``name``. Raises UnknownNameError, also for a tensor in which
    Hugging Face has several weights: see ``parts_of``."""
    parts = parts_of(name, model_type)
    if len(parts) > 1:
        raise UnknownNameError(f"{name} is {' and '.join(parts)} in one tensor")
    return parts[0]


def parts_of(name: str, model_type: str) -> list[str]:
    """The plain model's weights that are stacked on dimension 0 in Hugging Face's tensor ``name``, in order:
    one, but for tensors that a family has fused. Raises UnknownNameError."""
    for theirs, parts in FAMILIES[model_type].fused.items():
        layer, found, rest = name.partition(f".{theirs}.")
        if found and rest == "weight" and _LAYER.match(f"{layer}."):
            return [f"{layer}.{part}.weight" for part in parts]
    ours = _translate(name, _names(model_type))
    if ours is None:
        raise UnknownNameError(f"a Hugging Face {_title(model_type)} has no weight named {name!r}")
    return [ours]


def to_hf(name: str, model_type: str = "llama") -> str:
    """Hugging Face's name of the tensor that holds the plain model's ``name``. Raises UnknownNameError."""
    found = _translate(name, _inverse(model_type))
    if found is None:
        raise UnknownNameError(f"the plain {_title(model_type)} has no weight named {name!r}")
    return found


def hf_tensors(config: DecoderConfig) -> dict[str, list[str]]:
    """Hugging Face's name of each tensor of a model -> the plain model's weights in it, in the model's
    order."""
    found: dict[str, list[str]] = {}
    for name in weight_shapes(config):
        found.setdefault(to_hf(name, config.model_type), []).append(name)
    return found


def is_recomputed(hf_name: str) -> bool:
    """Whether the tensor follows from the configuration: rotary frequencies, stored in old files."""
    return _RECOMPUTED.search(hf_name) is not None


def _title(model_type: str) -> str:
    return FAMILIES[model_type].architecture.removesuffix("ForCausalLM")


@lru_cache
def _inverse(model_type: str) -> dict[str, str]:
    """The plain model's names -> Hugging Face's, of all tensors that the family may have."""
    family = FAMILIES[model_type]
    table = dict(_TABLE)
    for ours, theirs in family.modules.items():
        for what in ("weight", "bias"):
            table.pop(f"{_ANY}{ours}.{what}", None)
        if theirs is not None:
            table[f"{_ANY}{ours}.weight"] = f"{_ANY}{theirs}.weight"
    for theirs, parts in family.fused.items():
        for part in parts:
            table[f"{_ANY}{part}.weight"] = f"{_ANY}{theirs}.weight"
    return table


@lru_cache
def _names(model_type: str) -> dict[str, str]:
    """Hugging Face's names -> the plain model's, of the tensors that are not fused."""
    fused = {f"{_ANY}{part}.weight" for parts in FAMILIES[model_type].fused.values() for part in parts}
    return {theirs: ours for ours, theirs in _inverse(model_type).items() if ours not in fused}


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    match = _LAYER.match(name)
    found = table.get(_LAYER.sub(_ANY, name))
    if found is None or ("*" in found) != (match is not None):
        return None
    return found.replace("*", match[1]) if match else found
