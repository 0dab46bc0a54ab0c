"""A tiny model of each family that the decoder covers, with everything about it that can be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig, from_hf_dict
from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.weights.names import hf_tensors

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # of a token that pads, transformers has no gradient
}
GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "sliding_window": 40,
    "tie_word_embeddings": True,
}

VALUES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 40, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", "sliding_window": 40},
    "phi3, partial": {"model_type": "phi3", "partial_rotary_factor": 0.5},
    "olmo2": {"model_type": "olmo2"},
    "gemma2": {
        **GEMMA,
        "model_type": "gemma2",
        # Low, so that both show at the size of these scores and logits.
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {
        **GEMMA,
        "model_type": "gemma3_text",
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
"""Keys of ``config.json`` beside BASE."""
CONFIGS: dict[str, DecoderConfig] = {name: from_hf_dict(BASE | values) for name, values in VALUES.items()}
TOKENS = 24


def window(config: DecoderConfig, size: int) -> DecoderConfig:
    """With a window of that size, where there is one."""
    return config if config.sliding_window is None else replace(config, sliding_window=size)


@torch.no_grad()
def draw(model: Decoder, seed: int, std: float) -> None:
    """Values of which each counts: of norms, around what changes nothing, and of biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        is_norm = name.endswith("norm.weight")
        parameter.copy_(noise + (1.0 - model.config.norm_offset if is_norm else 0.0))


def build(config: DecoderConfig, attention: Attention | None = None) -> Decoder:
    model = Decoder(config, attention or DenseAttention())
    draw(model, 0, 0.2)
    return model


def theirs(config: DecoderConfig, model: Decoder) -> Any:
    """transformers' model with the same weights, put together by the family's own names."""
    import transformers

    hf_config = transformers.AutoConfig.for_model(**config.to_hf_dict(), attn_implementation="eager")
    auto: Any = transformers.AutoModelForCausalLM
    hf = auto.from_config(hf_config).float()
    assert type(hf).__name__ == config.family.architecture
    tensors = model.state_dict()
    stacked = {name: torch.cat([tensors[p] for p in parts]) for name, parts in hf_tensors(config).items()}
    missing, unexpected = hf.load_state_dict(stacked, strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()
    return hf.eval()


def inputs(config: DecoderConfig, start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, positions, and bounds of two rows of one sequence each."""
    ids = torch.randint(config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    index = torch.arange(TOKENS, dtype=torch.int32).expand(2, -1)
    return ids, index.long() + start, torch.zeros_like(index), index + 1


def ours(model: Decoder, start: int = 0) -> Tensor:
    ids, positions, *bounds = inputs(model.config, start)
    attention: Any = model.model.layers[0].self_attn.core_attn.attend  # type: ignore[union-attr]
    context = model.model.prepare(*bounds, attention.prepare)
    return model.logits(model(ids, positions, context))
