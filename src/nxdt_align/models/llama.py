"""A plain PyTorch Llama: no process group, no engine; parallelism is applied to it from outside.

Legend: ``B`` rows, ``S`` tokens, ``D`` hidden, ``N`` query heads, ``K`` key-value heads (K divides N),
``H`` head size, ``F`` MLP width, ``V`` vocabulary. Follows transformers' modeling_llama.py, whose
logits it gives on the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nxdt_align.errors import UserError
from nxdt_align.models.presets import LlamaConfig

Granularity = Literal["full", "selective"]
Rotary = tuple[Tensor, Tensor]
"""cos and sin, (B, S, 1, H) float32 each."""


class Attend(Protocol):
    """q (B, S, N, H), k and v (B, S, K, H), already rotated -> (B, S, N, H), scaled by 1/sqrt(H)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor: ...


Prepare = Callable[[Tensor, Tensor], Any]
"""The first and one past the last key that each token sees, (B, S) int32 each -> an attention's context."""


class Recompute(Protocol):
    """Calls ``function(*args)``, keeping ``args`` alone for the backward pass and calling it again there."""

    def __call__(self, function: Callable[..., Tensor], *args: Any) -> Tensor: ...


class Recomputable(nn.Module):
    """A module whose activations can be recomputed in the backward pass instead of kept.

    Inside ``forward``, so that hooks on the module run outside of the recomputed part.
    """

    recompute: Recompute | None = None

    def compute(self, *args: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, *args: Any) -> Tensor:
        if self.recompute is None or not torch.is_grad_enabled():
            return self.compute(*args)
        return self.recompute(self.compute, *args)


class LlamaRMSNorm(Recomputable):
    """Root-mean-square norm, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def compute(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Rotary frequencies, radians per token: (H / 2,) float32 on the CPU.

    Llama 3.1's scaling leaves wavelengths shorter than a context's ``high_freq_factor``-th part,
    divides those longer than its ``low_freq_factor``-th part, and blends between (transformers'
    ``_compute_llama3_parameters``).
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / (config.rope_theta ** (steps / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    low, high, context = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    assert low is not None and high is not None and context is not None
    wavelength = 2 * math.pi / inv_freq
    blend = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq


class LlamaRotaryEmbedding(nn.Module):
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), for all layers at once."""

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self._config = config
        # A meta-device context must not reach the values: they are never loaded.
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def reset_non_persistent(self, device: torch.device | str) -> None:
        """Compute the frequencies anew, on ``device``."""
        self.inv_freq = inverse_frequencies(self._config).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LlamaRotaryEmbedding:
        # After .to(dtype) the frequencies are float32 still; after .to_empty() they have their values.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_non_persistent(self.inv_freq.device)
        return self

    def forward(self, position_ids: Tensor) -> Rotary:
        """(B, S) -> cos and sin, (B, S, 1, H) float32 each."""
        angles = position_ids[:, :, None, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each head's halves, (B, S, any, H), by their position's angle: in float32, ``x``'s dtype out."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class QKVProjection(nn.Module):
    """The three input projections of attention, one unit for an engine to replace."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.q_proj = _linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = _linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = _linear(config.hidden_size, config.num_key_value_heads * config.head_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, N*H), (B, S, K*H), (B, S, K*H)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class GateUpProjection(nn.Module):
    """The two input projections of the MLP, one unit for an engine to replace."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, F), (B, S, F)."""
        return self.gate_proj(x), self.up_proj(x)


class CoreAttention(Recomputable):
    """The attention handed in; no weights."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def compute(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        return self._attend(q, k, v, context)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, attend: Attend) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVProjection(config)
        self.o_proj = _linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.core_attn = CoreAttention(attend)

    def forward(self, x: Tensor, rotary: Rotary, context: Any) -> Tensor:
        # Head counts are those of the tensors: a tensor-parallel projection returns its own heads.
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(x))
        out = self.core_attn(rotate(q, rotary), rotate(k, rotary), v, context)
        return self.o_proj(out.flatten(-2).contiguous())  # type: ignore[no-any-return]


class ActivationMultiplyMLP(Recomputable):
    def compute(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class LlamaMLP(Recomputable):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up_proj = GateUpProjection(config)
        self.activation_multiply = ActivationMultiplyMLP()
        self.down_proj = _linear(config.intermediate_size, config.hidden_size)

    def compute(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation_multiply(*self.gate_up_proj(x)))  # type: ignore[no-any-return]


class LlamaDecoderLayer(Recomputable):
    """``window``: the last tokens that its attention sees; None for all."""

    def __init__(self, config: LlamaConfig, attend: Attend, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, attend)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def compute(self, x: Tensor, rotary: Rotary, context: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, context)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class LlamaModel(nn.Module):
    """Everything below the head.

    ``embed_tokens`` and ``norm`` may be taken out (set to None), and ``layers`` be a ModuleDict of some of
    them. Hidden states go in where ``takes_hidden_states`` says so; an embedding that is there all the same
    is the head's. Without a norm, they come out as the last layer's.
    """

    takes_hidden_states = False

    embed_tokens: nn.Embedding | None
    layers: nn.ModuleList | nn.ModuleDict
    norm: LlamaRMSNorm | None

    def __init__(self, config: LlamaConfig, attend: Attend) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, attend, config.window_of(i)) for i in range(config.num_hidden_layers)
        )
        self._windows = {config.window_of(i) for i in range(config.num_hidden_layers)}
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def prepare(self, key_start: Tensor, key_stop: Tensor, prepare: Prepare) -> Any:
        """What ``forward`` takes as context, of rows whose tokens see these keys, (B, S) int32 each.

        Where layers have different windows: a context for each window.
        """

        def of_window(window: int | None) -> Any:
            if window is None:
                return prepare(key_start, key_stop)
            # Right in reading order. A response that is laid last token first must not be longer than the
            # window, with its prompt: the row plan sees to that. Its stop is kept either way.
            index = torch.arange(key_start.shape[1], dtype=key_start.dtype, device=key_start.device)
            return prepare(torch.maximum(key_start, index + (1 - window)), key_stop)

        contexts = {window: of_window(window) for window in self._windows}
        return contexts if len(contexts) > 1 else next(iter(contexts.values()))

    def context_of(self, layer: nn.Module, context: Any) -> Any:
        """``layer``'s own, out of what ``prepare`` gave."""
        return context[layer.window] if len(self._windows) > 1 else context

    def forward(self, x: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        """(B, S) token ids, or (B, S, D) hidden states, and (B, S) positions -> (B, S, D)."""
        if not self.takes_hidden_states:
            assert self.embed_tokens is not None
            x = self.embed_tokens(x)
        rotary = self.rotary_emb(position_ids)
        for layer in self.layers.children():
            x = layer(x, rotary, self.context_of(layer, context))
        return x if self.norm is None else self.norm(x)


RECOMPUTABLE: dict[str, type[Recomputable]] = {
    "CoreAttention": CoreAttention,
    "LlamaMLP": LlamaMLP,
    "LlamaRMSNorm": LlamaRMSNorm,
    "ActivationMultiplyMLP": ActivationMultiplyMLP,
}
"""NxDT's names in ``model.activations_checkpoint_recompute``."""


class Llama(nn.Module):
    """A Llama for causal language modelling.

    Args:
        config: its shape.
        attend: the attention over (q, k, v, context); ``context`` is made once per batch, by
            ``model.prepare`` of what ``attend`` prepares.

    Weights are PyTorch's defaults until an engine loads others. Built under ``torch.device("meta")``, it
    wants ``.to_empty(device=...)`` first.
    """

    def __init__(self, config: LlamaConfig, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, attend)
        head = None if config.tie_word_embeddings else _linear(config.hidden_size, config.vocab_size)
        self.lm_head: nn.Linear | None
        self.register_module("lm_head", head)

    def forward(self, input_ids: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        """(B, S), (B, S) integers -> the hidden states below the head, (B, S, D): see ``logits``.

        Where ``model`` takes hidden states: those, (B, S, D), instead of ``input_ids``.
        """
        return self.model(input_ids, position_ids, context)  # type: ignore[no-any-return]

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the embedding's where the head is tied to it."""
        owner = self.model.embed_tokens if self.lm_head is None else self.lm_head
        assert owner is not None, "this part of the model has no head"
        return owner.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V)."""
        if self.lm_head is None:
            return F.linear(hidden, self.head_weight)
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def set_checkpointing(
        self,
        granularity: Granularity | None,
        modules: Sequence[str] | None = None,
        recompute: Recompute | None = None,
    ) -> None:
        """Choose what the backward pass computes again instead of keeping; undoes an earlier choice.

        Args:
            granularity: ``full``: each decoder layer; ``selective``: the ``modules`` named, of
                RECOMPUTABLE; None: nothing.
            modules: read for ``selective`` alone.
            recompute: how; torch.utils.checkpoint without reentry where not given.

        Raises UserError for an unknown granularity or name, and for ``selective`` without a name.
        """
        chosen = _recomputed_types(granularity, modules or ())
        how = recompute or partial(checkpoint, use_reentrant=False)
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = how if isinstance(module, chosen) else None


def _recomputed_types(
    granularity: Granularity | None, names: Sequence[str]
) -> tuple[type[Recomputable], ...]:
    if granularity is None:
        return ()
    if granularity == "full":
        return (LlamaDecoderLayer,)
    if granularity != "selective":
        raise UserError(
            f"`activations_checkpoint_granularity` must be full, selective or null, but is {granularity!r}"
        )
    unknown = [name for name in names if name not in RECOMPUTABLE]
    if unknown or not names:
        raise UserError(
            "`activations_checkpoint_recompute` must name modules out of "
            f"{', '.join(RECOMPUTABLE)} where the granularity is selective, but is {list(names)}"
        )
    return tuple(RECOMPUTABLE[name] for name in names)
