"""Tiny models that transformers computes, and transformers' own forward pass as the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle import ExampleSet
from torch import Tensor

from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.backend.model import build
from nxdt_align.named_tensors import WeightSource

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # of a token that pads, transformers has no gradient
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
VALUES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gptj": {
        "model_type": "gptj",
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "rotary_dim": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": BASE | {"model_type": "gpt_neox"},
    "phi": BASE | {"model_type": "phi"},
    "smollm3": BASE | {"model_type": "smollm3", "num_hidden_layers": 4},
    "smollm3, windows": BASE
    | {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 24,
    },
    "glm": BASE | {"model_type": "glm", "head_dim": 8},
    "granite": BASE
    | {
        "model_type": "granite",
        "logits_scaling": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 4.0,
    },
    "cohere2": BASE | {"model_type": "cohere2", "num_hidden_layers": 4, "sliding_window": 24},
    # Low caps, so that both show at the size of these scores and logits.
    "gemma2": BASE
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "mixtral": BASE | MIXTRAL,
    "mixtral, windows": BASE | MIXTRAL | {"sliding_window": 24},
    "qwen3_moe": BASE
    | {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": BASE
    | {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}
"""``config.json`` of models that take our layouts."""
ALONE: dict[str, dict[str, Any]] = {
    "stablelm": BASE | {"model_type": "stablelm"},
    "falcon": BASE | {"model_type": "falcon"},
    "llama4": BASE
    | {
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "num_local_experts": 2,
        "attention_chunk_size": 24,
    },
}
"""And of those that take a response per row alone."""
WINDOWS = dict.fromkeys(("smollm3, windows", "cohere2", "gemma2", "mixtral, windows"), 24)


def config_of(name: str, **changes: Any) -> TransformersConfig:
    return TransformersConfig.of((VALUES | ALONE)[name] | changes)


def drawn(config: TransformersConfig, seed: int = 0, std: float = 0.1) -> Any:
    """transformers' own model, with its stock attention and weights of which each counts."""
    torch.manual_seed(seed)
    model: Any = build(config, None, device="cpu")
    kept = model.state_dict()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for name, b in model.named_buffers() if name in kept)):
            tensor.add_(torch.randn_like(tensor) * std)
    return model


class StateDict(WeightSource):
    """A model's own tensors as an engine's WeightSource."""

    def __init__(self, config: TransformersConfig, model: Any) -> None:
        tensors = model.state_dict()
        self._tensors = {name: tensors[name].clone() for name in config.weight_shapes()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        return self._tensors[name][tuple(region)]


def response_logp(model: Any, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """log p(response | prompt), a scalar, from the whole logits of transformers' own forward pass."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    summed: Tensor = logps[len(prompt) - 1 :].sum()
    return summed


def dpo_loss(model: Any, reference: Any, examples: ExampleSet, beta: float) -> Tensor:
    """Mean over pairs of -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), one response at
    a time."""
    losses = []
    for example in (examples[index] for index in range(len(examples))):
        chosen, rejected = (response_logp(model, example.prompt, r) for r in example.responses)
        with torch.no_grad():
            held = [response_logp(reference, example.prompt, r) for r in example.responses]
        losses.append(torch.log1p(torch.exp(-beta * ((chosen - held[0]) - (rejected - held[1])))))
    return torch.stack(losses).mean()


def write_model(folder: Path, config: TransformersConfig, tokenizer: Any, *, seed: int = 0) -> Any:
    """A folder as ``save_pretrained`` writes it; the model in it."""
    model = drawn(config, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
