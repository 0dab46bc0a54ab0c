"""What shape a Llama has: its sizes, the rules that they keep, and the weights that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from nxdt_align.errors import UserError

ModelType = Literal["llama", "mistral"]
TokenIds = int | tuple[int, ...] | None


class ModelConfigError(UserError):
    """A model configuration that cannot be used; the message names every key at fault."""


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of the pre-training."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    """llama3 alone, as the two below it."""
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama. Raises ModelConfigError naming every rule that the values break."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    bos_token_id: TokenIds = 1
    eos_token_id: TokenIds = 2
    pad_token_id: TokenIds = None
    model_type: ModelType = "llama"
    """A Mistral may have a window, and differs in its ``config.json``."""
    sliding_window: int | None = None
    """Mistral's attention window: tokens that a token sees, itself included (https://arxiv.org/abs/2310.06825)."""

    def __post_init__(self) -> None:
        faults = broken_rules(vars(self))
        if faults:
            raise config_error("model configuration", faults)

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer's attention sees, the token itself included; None for all before it."""
        return self.sliding_window

    def with_overrides(
        self,
        num_layers: int | None = None,
        hidden_size: int | None = None,
        rope_theta: float | None = None,
        max_position_embeddings: int | None = None,
    ) -> LlamaConfig:
        """The shape with NxDT's ``model.*`` keys laid over it; None leaves a value as it is.

        Another ``hidden_size`` makes ``head_dim`` hidden_size / num_attention_heads, as in NxDT; the
        same ``hidden_size`` leaves it. Raises ModelConfigError.
        """
        keys: dict[str, float | None] = {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "rope_theta": rope_theta,
            "max_position_embeddings": max_position_embeddings,
        }
        given = {key: value for key, value in keys.items() if value is not None}
        faults = [f"`{key}` must be positive, but is {value}" for key, value in given.items() if value <= 0]
        changes: dict[str, Any] = {
            ("num_hidden_layers" if k == "num_layers" else k): v for k, v in given.items()
        }
        if hidden_size is not None and hidden_size != self.hidden_size:
            heads = self.num_attention_heads
            if hidden_size % heads:
                rule = f"must be a multiple of `num_attention_heads` ({heads})"
                faults.append(f"`hidden_size` {rule}, but is {hidden_size}")
            changes["head_dim"] = hidden_size // heads
        if faults:
            raise config_error("model configuration", faults)
        return replace(self, **changes)

    def to_hf_dict(self) -> dict[str, Any]:
        """A ``config.json`` that transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) read."""
        scaling = None
        if self.rope_scaling is not None:
            scaling = {key: value for key, value in vars(self.rope_scaling).items() if value is not None}
        result = dict(vars(self))
        result |= {
            "architectures": ["LlamaForCausalLM" if self.model_type == "llama" else "MistralForCausalLM"],
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
            "use_cache": True,
        }
        if self.model_type != "mistral":
            del result["sliding_window"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in result.items()}


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the plain Llama with its whole shape, in the model's order."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        shapes[f"{layer}.self_attn.qkv_proj.q_proj.weight"] = (N * H, D)
        shapes[f"{layer}.self_attn.qkv_proj.k_proj.weight"] = (K * H, D)
        shapes[f"{layer}.self_attn.qkv_proj.v_proj.weight"] = (K * H, D)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (D, N * H)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        shapes[f"{layer}.mlp.gate_up_proj.gate_proj.weight"] = (F, D)
        shapes[f"{layer}.mlp.gate_up_proj.up_proj.weight"] = (F, D)
        shapes[f"{layer}.mlp.down_proj.weight"] = (D, F)
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    return shapes


def parameter_count(config: LlamaConfig) -> int:
    """Trainable numbers; a tied head counts once."""
    return sum(prod(shape) for shape in weight_shapes(config).values())


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
)

_RULES: tuple[tuple[tuple[str, ...], Callable[..., bool], str], ...] = (
    *(((key,), lambda value: value > 0, f"`{key}` must be positive, but is {{0}}") for key in _POSITIVE),
    (("initializer_range",), lambda std: std >= 0, "`initializer_range` must not be negative, but is {0}"),
    (
        ("num_attention_heads", "num_key_value_heads"),
        lambda heads, kv_heads: kv_heads <= 0 or heads % kv_heads == 0,
        "`num_key_value_heads` must divide `num_attention_heads` ({0}), but is {1}",
    ),
    (("head_dim",), lambda size: size % 2 == 0, "`head_dim` must be even (rotary embedding), but is {0}"),
    (
        ("rope_scaling",),
        lambda scaling: scaling.factor >= 1,
        "`rope_scaling.factor` must be at least 1, but is {0.factor}",
    ),
    (
        ("rope_scaling",),
        lambda scaling: scaling.rope_type == "linear" or None not in vars(scaling).values(),
        "`rope_scaling` of type llama3 needs factor, low_freq_factor, high_freq_factor and "
        "original_max_position_embeddings, but is {0}",
    ),
)


def broken_rules(values: Mapping[str, Any]) -> list[str]:
    """What breaks a rule; a rule whose values are not all known is left out."""
    faults = []
    for keys, holds, message in _RULES:
        operands = [values.get(key) for key in keys]
        if None not in operands and not holds(*operands):
            faults.append(message.format(*operands))
    return faults


def config_error(where: str, faults: list[str]) -> ModelConfigError:
    """One error for all ``faults``."""
    if len(faults) == 1:
        return ModelConfigError(f"{where}: {faults[0]}")
    return ModelConfigError(f"{where} has {len(faults)} faults:\n  " + "\n  ".join(faults))
