"""What shape a model has: its sizes, the rules that they keep, and the weights that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Literal, Protocol

from nxdt_align.errors import UserError
from nxdt_align.models.families import FAMILIES, Family
from nxdt_align.models.families.base import FULL
from nxdt_align.models.fields import TokenIds

Activation = Literal["silu", "gelu_pytorch_tanh"]
NormPlaces = Literal["before", "after", "both"]
"""Of attention and MLP, in the residual stream: of what goes in, of what comes out."""
QKNorm = Literal["head", "projection"]
"""Over each head of q and k by itself, or over all heads of q, and of k, together."""


def _told(config: Any, since: str, name: str) -> str:
    """A dataclass's text under ``name``, but for the fields from ``since`` on that have their defaults."""
    told, is_late = [], False
    for field in fields(config):
        is_late = is_late or field.name == since
        value = getattr(config, field.name)
        if not is_late or value != field.default:
            told.append(f"{field.name}={value!r}")
    return f"{name}({', '.join(told)})"


class ModelShape(Protocol):
    """What every model says of itself: one of ours (DecoderConfig), or any other of transformers
    (models.backend). Fields are explained there."""

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def sliding_window(self) -> int | None: ...
    @property
    def layer_types(self) -> tuple[str, ...] | None: ...
    @property
    def attention_softcap(self) -> float | None: ...
    @property
    def float32_weights(self) -> frozenset[str]: ...
    def to_hf_dict(self) -> dict[str, Any]: ...
    def to_record(self) -> dict[str, Any]: ...
    def weight_shapes(self) -> dict[str, tuple[int, ...]]: ...
    def linear_layers(self) -> LinearLayers: ...


@dataclass(frozen=True)
class LinearLayers:
    """A model's linear layers that may have adapters, and what of it can be trained whole beside them."""

    sizes: Mapping[str, tuple[int, int]]
    """Path -> outputs and inputs, in the model's order; without the head."""
    modules: tuple[str, ...]
    """Paths of the modules that can be trained whole, in the model's order."""
    embedding: str
    """Path of the input embedding, which is the head's weight, too, where that is tied."""
    transposed: frozenset[str] = frozenset()
    """Those whose weight is (inputs, outputs), as of GPT-2's Conv1D."""


class ModelConfigError(UserError):
    """A model configuration that cannot be used; the message names every key at fault."""


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of the pre-training."""

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float | None = None
    """llama3 alone, as the one below it."""
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    """llama3 and yarn."""
    beta_fast: float | None = None
    """yarn alone, as all below it (https://arxiv.org/abs/2309.00071)."""
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __repr__(self) -> str:
        return _told(self, since="beta_fast", name="RopeScaling")


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a Llama, or of a model of another family: the fields from ``model_type`` on say how it
    differs. Raises ModelConfigError naming every rule that the values break."""

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
    model_type: str = "llama"
    """The family, of models.families: names and keys of its files. What is computed the other fields say."""
    sliding_window: int | None = None
    """Attention window: tokens that a token sees, itself included (https://arxiv.org/abs/2310.06825)."""
    layer_types: tuple[str, ...] | None = None
    """``full_attention`` or ``sliding_attention`` for each layer; None: all have the window."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Of attention's last projection."""
    mlp_bias: bool = False
    qk_norm: QKNorm | None = None
    norms: NormPlaces = "before"
    norm_offset: float = 0.0
    """Added to the norms' weights: 1 where a weight of 0 changes nothing."""
    activation: Activation = "silu"
    scales_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    attention_scale: float | None = None
    """Of the scores; None: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Scores x become cap * tanh(x / cap)."""
    logits_softcap: float | None = None
    local_rope_theta: float | None = None
    """Rotary base of the layers with a window, unscaled; None: that of the others."""
    partial_rotary_factor: float = 1.0
    """Part of each head, from its start, that is rotated."""

    def __post_init__(self) -> None:
        faults = broken_rules(vars(self))
        if faults:
            raise config_error("model configuration", faults)

    def __repr__(self) -> str:
        """Part of a reference store's fingerprint: a Llama's must stay what it is, with the class's name of
        the time when it covered no other family."""
        return _told(self, since="layer_types", name="LlamaConfig")

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer's attention sees, the token itself included; None for all before it."""
        is_full = self.layer_types is not None and self.layer_types[layer] == FULL
        return None if is_full else self.sliding_window

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def rotary_dim(self) -> int:
        """Entries of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def with_overrides(
        self,
        num_layers: int | None = None,
        hidden_size: int | None = None,
        rope_theta: float | None = None,
        max_position_embeddings: int | None = None,
    ) -> DecoderConfig:
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
        if num_layers is not None and self.layer_types is not None:
            if num_layers > len(self.layer_types):
                rule = (
                    f"must be at most the model's own ({len(self.layer_types)}), as windows differ by layer"
                )
                faults.append(f"`num_layers` {rule}, but is {num_layers}")
            changes["layer_types"] = self.layer_types[:num_layers]
        if faults:
            raise config_error("model configuration", faults)
        return replace(self, **changes)

    @property
    def float32_weights(self) -> frozenset[str]:
        """Names of weights that are float32 whatever the model computes in."""
        return frozenset()

    def to_record(self) -> dict[str, Any]:
        """What a run's record says of the model."""
        return self.to_hf_dict()

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """``weight_shapes`` of it."""
        return _decoder_shapes(self)

    def linear_layers(self) -> LinearLayers:
        """Those of the decoder's layers."""
        shapes = _decoder_shapes(self).items()
        weights = {name.removesuffix(".weight"): shape for name, shape in shapes if name.endswith(".weight")}
        layers = {path: shape for path, shape in weights.items() if path.startswith("model.layers.")}
        sizes = {path: (shape[0], shape[1]) for path, shape in layers.items() if len(shape) == 2}
        return LinearLayers(sizes, tuple(weights), "model.embed_tokens")

    def to_hf_dict(self) -> dict[str, Any]:
        """A ``config.json`` that transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) read."""
        result = {key: getattr(self, key) for key in _WRITTEN_AS_THEY_ARE}
        result |= self.rotary_json()
        result |= {
            "architectures": [self.family.architecture],
            "hidden_act": self.activation,
            "attention_bias": self.output_bias,
            "attention_dropout": 0.0,
            "mlp_bias": self.mlp_bias,
            "use_cache": True,
        }
        result |= self.family.write(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in result.items()}

    def rotary_json(self) -> dict[str, Any]:
        """The rotary settings in both spellings."""
        scaling = None
        if self.rope_scaling is not None:
            scaling = {key: value for key, value in vars(self.rope_scaling).items() if value is not None}
        parameters = {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}
        partial = {}
        if self.partial_rotary_factor != 1:
            partial["partial_rotary_factor"] = self.partial_rotary_factor
        return {
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": parameters | partial,
            **partial,
        }


def weight_shapes(config: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every weight of the plain model with its whole shape, in the model's order."""
    return config.weight_shapes()


def _decoder_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    D = config.hidden_size
    in_layer = _layer_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in in_layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    return shapes


def _layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    if config.norms != "after":
        shapes["input_layernorm.weight"] = (D,)
    for part, heads in (("q", N), ("k", K), ("v", K)):
        linear(f"self_attn.qkv_proj.{part}_proj", heads * H, D, config.qkv_bias)
    linear("self_attn.o_proj", D, N * H, config.output_bias)
    if config.qk_norm == "head":
        shapes |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
    elif config.qk_norm == "projection":
        shapes |= {
            "self_attn.q_projection_norm.weight": (N * H,),
            "self_attn.k_projection_norm.weight": (K * H,),
        }
    if config.norms != "before":
        shapes["attention_output_norm.weight"] = (D,)
    if config.norms != "after":
        shapes["post_attention_layernorm.weight"] = (D,)
    linear("mlp.gate_up_proj.gate_proj", F, D, config.mlp_bias)
    linear("mlp.gate_up_proj.up_proj", F, D, config.mlp_bias)
    linear("mlp.down_proj", D, F, config.mlp_bias)
    if config.norms != "before":
        shapes["mlp_output_norm.weight"] = (D,)
    return shapes


def parameter_count(config: ModelShape) -> int:
    """Trainable numbers; a tied head counts once."""
    return sum(prod(shape) for shape in weight_shapes(config).values())


_WRITTEN_AS_THEY_ARE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
)
"""Fields that have the names of config.json's keys."""

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
    "attention_scale",
    "attention_softcap",
    "logits_softcap",
    "local_rope_theta",
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
        ("head_dim", "partial_rotary_factor"),
        lambda size, part: part == 1 or (0 < part < 1 and int(size * part) % 2 == 0 < int(size * part)),
        "`partial_rotary_factor` must be above 0, at most 1, and rotate an even part of head_dim ({0}), but "
        "is {1}",
    ),
    (
        ("model_type",),
        lambda name: name in FAMILIES,
        f"`model_type` must be one of {', '.join(FAMILIES)}, but is {{0}}",
    ),
    (
        ("num_hidden_layers", "layer_types"),
        lambda layers, types: layers == len(types),
        "`layer_types` must have num_hidden_layers ({0}) entries, but is {1}",
    ),
    (
        ("rope_scaling",),
        lambda scaling: scaling.factor >= 1,
        "`rope_scaling.factor` must be at least 1, but is {0.factor}",
    ),
    (
        ("rope_scaling",),
        lambda scaling: (
            scaling.rope_type != "llama3"
            or None
            not in (
                scaling.low_freq_factor,
                scaling.high_freq_factor,
                scaling.original_max_position_embeddings,
            )
        ),
        "`rope_scaling` of type llama3 needs factor, low_freq_factor, high_freq_factor and "
        "original_max_position_embeddings, but is {0}",
    ),
    (
        ("rope_scaling",),
        lambda scaling: scaling.rope_type != "yarn" or scaling.original_max_position_embeddings is not None,
        "`rope_scaling` of type yarn needs original_max_position_embeddings, but is {0}",
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
