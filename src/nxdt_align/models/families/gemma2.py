"""Gemma 2: norms of 1 + w before and after, soft caps, a scaled embedding, and a window in every other layer
(https://arxiv.org/abs/2408.00118)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nxdt_align.models.families.base import FULL, SLIDING, Family, attention_bias, windows, written_types
from nxdt_align.models.fields import Fields

if TYPE_CHECKING:
    from nxdt_align.models.config import DecoderConfig

DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "sliding_window": 4096,
}
TRAITS: Mapping[str, Any] = {"norms": "both", "norm_offset": 1.0, "scales_embedding": True}
MODULES: Mapping[str, str | None] = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
ONLY: Mapping[str, Any] = {"mlp_bias": False, "use_bidirectional_attention": False}


def read_gemma(fields: Fields, caps: tuple[float | None, float | None]) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common. ``caps``: of attention and logits, where the keys are absent."""
    query = fields.number("query_pre_attn_scalar", 256.0)
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    attention, logits = (
        # A null is a value here: no cap.
        fields.number(key, None if key in fields.values else absent)
        for key, absent in zip(keys, caps, strict=True)
    )
    return {
        **attention_bias(fields),
        "attention_scale": query**-0.5 if query is not None and query > 0 else query,
        "attention_softcap": attention,
        "logits_softcap": logits,
    }


def write_gemma(config: DecoderConfig) -> dict[str, Any]:
    assert config.attention_scale is not None
    query = config.attention_scale**-2
    return {
        "hidden_activation": config.activation,
        # An integer in transformers' own configurations; the power's rounding must not make it another.
        "query_pre_attn_scalar": round(query) if abs(query - round(query)) < 1e-6 else query,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
        "sliding_window": config.sliding_window,
        "layer_types": written_types(config),
    }


def _read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    of_layers = windows(fields, found, lambda layer: FULL if layer % 2 else SLIDING)
    return {**read_gemma(fields, (50.0, 30.0)), **of_layers}


_SIZES: Mapping[str, Mapping[str, Any]] = {
    "google/gemma-2-9b-it": {
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
}

GEMMA2 = Family(
    "Gemma2ForCausalLM",
    defaults=DEFAULTS,
    traits=TRAITS,
    read=_read,
    write=write_gemma,
    only=ONLY,
    activation_key="hidden_activation",
    modules=MODULES,
    sizes=_SIZES,
)
