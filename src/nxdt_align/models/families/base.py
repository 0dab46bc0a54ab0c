"""What a family of models states about itself: how it differs from Llama, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nxdt_align.models.config import DecoderConfig
    from nxdt_align.models.fields import Fields

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names in ``layer_types``."""


def _no_fields(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_keys(config: DecoderConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """A family of models that the decoder covers."""

    architecture: str
    """transformers' class."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for keys that a ``config.json`` leaves out, where it is not as for a Llama."""
    traits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of DecoderConfig that all models of the family have."""
    read: Callable[[Fields, Mapping[str, Any]], dict[str, Any]] = _no_fields
    """Further fields of DecoderConfig, from ``config.json`` and the fields known so far; a fault is noted."""
    write: Callable[[DecoderConfig], dict[str, Any]] = _no_keys
    """Keys of ``config.json`` beside those that all families have."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``config.json`` with the one value that is supported."""
    activation_key: str = "hidden_act"
    rope_types: tuple[str, ...] = ROPE_TYPES
    partial_rotary: bool = False
    """Whether ``partial_rotary_factor`` is a key of the family's."""
    rope_theta: float = 10000.0
    """Where ``config.json`` has none."""
    local_rope_theta: float | None = None
    """The same for layers with a window, in families where these have a base of their own."""
    modules: Mapping[str, str | None] = field(default_factory=dict)
    """The decoder's name of a module in a layer -> Hugging Face's, where that is not as for a Llama; None for
    a module that the family does not have."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Hugging Face's name of a module in a layer -> the decoder's, stacked on dimension 0."""
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name on the Hugging Face Hub -> what its ``config.json`` says of sizes: planned without a download."""


# What several families read and write alike


def attention_bias(fields: Fields) -> dict[str, Any]:
    """One key for the biases of all four projections of attention."""
    has_bias = fields.boolean("attention_bias", False)
    return {"qkv_bias": has_bias, "output_bias": has_bias}


def layer_types(fields: Fields, layers: int | None, default: Callable[[int], str]) -> tuple[str, ...] | None:
    """Which layers have the window. ``default``: transformers' choice for a layer."""
    given = fields.values.get("layer_types")
    if given is None:
        return None if layers is None else tuple(default(layer) for layer in range(layers))
    if not isinstance(given, list) or len(given) != layers or not {FULL, SLIDING}.issuperset(given):
        fields.fault(
            "layer_types", f"must be a list of num_hidden_layers ({layers}) of {FULL} or {SLIDING}", given
        )
        return None
    return tuple(given)


def windows(fields: Fields, found: Mapping[str, Any], default: Callable[[int], str]) -> dict[str, Any]:
    """``sliding_window`` and ``layer_types``; neither where no layer has a window."""
    window = fields.integer("sliding_window", None)
    types = layer_types(fields, found["num_hidden_layers"], default)
    if types is None:
        return {}
    if SLIDING not in types:
        return {"sliding_window": None, "layer_types": None}
    if window is None:
        fields.fault("sliding_window", f"must be an integer for layers of {SLIDING}", window)
    return {"sliding_window": window, "layer_types": None if FULL not in types else types}


def written_types(config: DecoderConfig) -> list[str]:
    """``layer_types`` as transformers has it."""
    return [FULL if config.window_of(i) is None else SLIDING for i in range(config.num_hidden_layers)]
