"""A plain PyTorch decoder: no process group, no engine; parallelism is applied to it from outside.

A Llama, and with the fields of its configuration that say so, a model of another of ``models.families``.

Legend: ``B`` rows, ``S`` tokens, ``D`` hidden, ``N`` query heads, ``K`` key-value heads (K divides N),
``H`` head size, ``F`` MLP width, ``V`` vocabulary. Follows transformers' modeling files, whose logits it
gives on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nxdt_align.errors import UserError
from nxdt_align.models.adapters import weight_in_use
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.models.rotary import Rotary, RotaryEmbedding, rotate

Granularity = Literal["full", "selective"]
Attend = Callable[..., Tensor]
"""(q, k, v, context), q (B, S, N, H), k and v (B, S, K, H), already rotated -> (B, S, N, H), scaled by
1/sqrt(H). It is asked for a cap of the scores by the keyword ``softcap``, where there is one."""

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


class RMSNorm(Recomputable):
    """Root-mean-square norm, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps
        self.offset = config.norm_offset

    def compute(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.weight)

    def scaled(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` normed, times ``weight``: the module's, or an engine's view of it."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(self.mean_square(x32) + self.eps)
        if self.offset:
            # As in transformers' Gemma: rounded once, after the product.
            return (normed * (self.offset + weight.float())).to(x.dtype)
        return weight * normed.to(x.dtype)

    def mean_square(self, x: Tensor) -> Tensor:
        """(..., size) float32 -> (..., 1). One unit for an engine to replace."""
        return x.pow(2).mean(-1, keepdim=True)


class ScaledEmbedding(nn.Module):
    """What comes out of the embedding times sqrt(D), (B, S, D); no weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._scale = config.hidden_size**0.5

    def forward(self, x: Tensor) -> Tensor:
        # In the embedding's dtype, as transformers rounds it.
        return x * float(torch.tensor(self._scale, dtype=x.dtype, device="cpu"))


def _linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


class QKVProjection(nn.Module):
    """The three input projections of attention, one unit for an engine to replace."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, H, has_bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.q_proj = _linear(D, config.num_attention_heads * H, has_bias)
        self.k_proj = _linear(D, config.num_key_value_heads * H, has_bias)
        self.v_proj = _linear(D, config.num_key_value_heads * H, has_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, N*H), (B, S, K*H), (B, S, K*H)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class GateUpProjection(nn.Module):
    """The two input projections of the MLP, one unit for an engine to replace."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, F), (B, S, F)."""
        return self.gate_proj(x), self.up_proj(x)


class CoreAttention(Recomputable):
    """The attention handed in; no weights."""

    def __init__(self, attend: Attend, softcap: float | None) -> None:
        super().__init__()
        self.attend = attend
        # Not passed where there is none: an attention that knows no cap must not ignore one.
        self._softcap = {} if softcap is None else {"softcap": softcap}

    def compute(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        return self.attend(q, k, v, context, **self._softcap)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, attend: Attend) -> None:
        super().__init__()
        queries = config.num_attention_heads * config.head_dim
        self.head_dim = config.head_dim
        self.qkv_proj = QKVProjection(config)
        self.o_proj = _linear(queries, config.hidden_size, config.output_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm == "head":
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)
        elif config.qk_norm == "projection":
            self.q_projection_norm = RMSNorm(queries, config)
            self.k_projection_norm = RMSNorm(config.num_key_value_heads * config.head_dim, config)
        # Backends scale by 1 / sqrt(H); another scale is the queries'.
        scale = config.attention_scale
        self._query_scale = 1.0 if scale is None else scale * config.head_dim**0.5
        self.core_attn = CoreAttention(attend, config.attention_softcap)

    def forward(self, x: Tensor, rotary: Rotary, context: Any) -> Tensor:
        q, k, v = self.qkv_proj(x)
        if self.qk_norm == "projection":
            q, k = self.q_projection_norm(q), self.k_projection_norm(k)
        # Head counts are those of the tensors: a tensor-parallel projection returns its own heads.
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        out = self.core_attn(rotate(q, rotary, self._query_scale), rotate(k, rotary), v, context)
        return self.o_proj(out.flatten(-2).contiguous())  # type: ignore[no-any-return]


class ActivationMultiplyMLP(Recomputable):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._activate = ACTIVATIONS[config.activation]

    def compute(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._activate(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class MLP(Recomputable):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = GateUpProjection(config)
        self.activation_multiply = ActivationMultiplyMLP(config)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def compute(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation_multiply(*self.gate_up_proj(x)))  # type: ignore[no-any-return]


class DecoderLayer(Recomputable):
    """``window``: the last tokens that its attention sees; None for all.

    Norms stand before attention and MLP (``input_layernorm``, ``post_attention_layernorm``, Llama's names),
    after them, or both.
    """

    def __init__(self, config: DecoderConfig, attend: Attend, window: int | None) -> None:
        super().__init__()
        self.window = window
        before, after = config.norms != "after", config.norms != "before"

        def norm(is_there: bool) -> nn.Module:
            return RMSNorm(config.hidden_size, config) if is_there else nn.Identity()

        self.input_layernorm = norm(before)
        self.self_attn = Attention(config, attend)
        self.attention_output_norm = norm(after)
        self.post_attention_layernorm = norm(before)
        self.mlp = MLP(config)
        self.mlp_output_norm = norm(after)

    def compute(self, x: Tensor, rotary: Rotary, context: Any) -> Tensor:
        x = x + self.attention_output_norm(self.self_attn(self.input_layernorm(x), rotary, context))
        return x + self.mlp_output_norm(self.mlp(self.post_attention_layernorm(x)))  # type: ignore[no-any-return]


def first_keys_in_window(key_start: Tensor, window: int) -> Tensor:
    """(B, S) int32: the first key that each token sees with a window of that many tokens.

    Right in reading order. A response that is laid last token first must not be longer than the window, with
    its prompt: the row plan sees to that. One past the last key is kept either way.
    """
    index = torch.arange(key_start.shape[1], dtype=key_start.dtype, device=key_start.device)
    return torch.maximum(key_start, index + (1 - window))


class DecoderStack(nn.Module):
    """Everything below the head.

    ``embed_tokens`` and ``norm`` may be taken out (set to None), and ``layers`` be a ModuleDict of some of
    them. Hidden states go in where ``takes_hidden_states`` says so; an embedding that is there all the same
    is the head's. Without a norm, they come out as the last layer's.
    """

    takes_hidden_states = False
    leaves_norm = False
    """Whether hidden states come out before the norm, which then is the caller's part."""

    embed_tokens: nn.Embedding | None
    layers: nn.ModuleList | nn.ModuleDict
    norm: RMSNorm | None

    def __init__(self, config: DecoderConfig, attend: Attend) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.scaled_embedding: nn.Module = (
            ScaledEmbedding(config) if config.scales_embedding else nn.Identity()
        )
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, attend, config.window_of(i)) for i in range(config.num_hidden_layers)
        )
        self._windows = {config.window_of(i) for i in range(config.num_hidden_layers)}
        self._has_local_rotary = config.local_rope_theta is not None
        self.norm = RMSNorm(config.hidden_size, config)

    def prepare(self, key_start: Tensor, key_stop: Tensor, prepare: Prepare) -> Any:
        """What ``forward`` takes as context, of rows whose tokens see these keys, (B, S) int32 each.

        Where layers have different windows: a context for each window.
        """

        def of_window(window: int | None) -> Any:
            if window is None:
                return prepare(key_start, key_stop)
            return prepare(first_keys_in_window(key_start, window), key_stop)

        contexts = {window: of_window(window) for window in self._windows}
        return contexts if len(contexts) > 1 else next(iter(contexts.values()))

    def context_of(self, layer: nn.Module, context: Any) -> Any:
        """``layer``'s own, out of what ``prepare`` gave."""
        return context[layer.window] if len(self._windows) > 1 else context

    def rotary_of(self, layer: nn.Module, rotary: Any) -> Rotary:
        """``layer``'s own, out of what ``rotary_emb`` gave."""
        if not self._has_local_rotary:
            return rotary  # type: ignore[no-any-return]
        return rotary[0 if layer.window is None else 1]  # type: ignore[no-any-return]

    def forward(self, x: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        """(B, S) token ids, or (B, S, D) hidden states, and (B, S) positions -> (B, S, D)."""
        x, rotary = self.enter(x, position_ids)
        for layer in self.layers.children():
            x = layer(x, self.rotary_of(layer, rotary), self.context_of(layer, context))
        return x if self.norm is None or self.leaves_norm else self.norm(x)

    def finish(self, x: Tensor) -> Tensor:
        """The norm, where ``forward`` leaves it."""
        return self.norm(x) if self.leaves_norm and self.norm is not None else x

    def enter(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Any]:
        """What ``forward`` takes -> (B, S, D) and the angles: all that stands before the first layer."""
        if not self.takes_hidden_states:
            assert self.embed_tokens is not None
            x = self.scaled_embedding(self.embed_tokens(x))
        return x, self.rotary_emb(position_ids)


RECOMPUTABLE: dict[str, type[Recomputable]] = {
    "CoreAttention": CoreAttention,
    "LlamaMLP": MLP,
    "LlamaRMSNorm": RMSNorm,
    "ActivationMultiplyMLP": ActivationMultiplyMLP,
}
"""NxDT's names in ``model.activations_checkpoint_recompute``."""


class HeadForm(NamedTuple):
    """What becomes of the head's products x, its bias included: cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    softcap: float | None = None
    """None: no cap, scale * x."""

    def applied(self, products: Tensor) -> Tensor:
        """Logits, in the shape of ``products``."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def no_router(config: ModelShape, weight: float) -> str:
    return (
        f"model.router_aux_loss_coef: is {weight:g}, but a {config.model_type} has no experts whose router "
        "could be balanced; set it to 0"
    )


class CausalModel(nn.Module):
    """What engines ask of a model, ours or transformers': hidden states and the head above them."""

    config: ModelShape

    def prepare(self, key_start: Tensor, key_stop: Tensor, prepare: Prepare) -> Any:
        """What ``forward`` takes as context, of rows whose tokens see these keys, (B, S) int32 each."""
        raise NotImplementedError

    @property
    def tree(self) -> nn.Module:
        """The module in which the weights' names are paths."""
        return self

    def fill_buffers(self) -> None:
        """Give what is computed from the configuration its values, after ``to_empty``."""

    @property
    def takes_cache(self) -> bool:
        """Whether earlier tokens count for a token through its attention's keys and values alone, which may
        then be kept by another attention: ``set_attention``."""
        raise NotImplementedError

    def set_attention(self, attend: Attend) -> None:
        """Have the layers attend by ``attend`` from now on. For models that ``takes_cache``."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """Those that are here, in order."""
        raise NotImplementedError

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        raise NotImplementedError

    @property
    def head_bias(self) -> Tensor | None:
        """(V,)."""
        return None

    @property
    def head_form(self) -> HeadForm:
        raise NotImplementedError

    router_weight = 0.0
    """Of the router's balancing loss in what is trained."""

    def balance_router(self, weight: float) -> None:
        """Have forward passes keep what ``router_loss`` needs, and ``router_weight`` be this.

        Raises UserError for a model without experts.
        """
        raise UserError(no_router(self.config, weight))

    def router_loss(self, weights: Tensor) -> Tensor:
        """() float32: the balancing loss of the last forward pass, whose tokens count by ``weights``, in the
        shape of its ``input_ids``."""
        raise NotImplementedError

    def set_checkpointing(
        self,
        granularity: Granularity | None,
        modules: Sequence[str] | None = None,
        recompute: Recompute | None = None,
    ) -> None:
        """See ``Decoder.set_checkpointing``."""
        raise NotImplementedError


class Decoder(CausalModel):
    """A Llama for causal language modelling.

    Args:
        config: its shape.
        attend: the attention over (q, k, v, context); ``context`` is made once per batch, by
            ``model.prepare`` of what ``attend`` prepares.

    Weights are PyTorch's defaults until an engine loads others. Built under ``torch.device("meta")``, it
    wants ``.to_empty(device=...)`` first.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config, attend)
        head = None if config.tie_word_embeddings else _linear(config.hidden_size, config.vocab_size)
        self.lm_head: nn.Linear | None
        self.register_module("lm_head", head)

    def forward(self, input_ids: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        """(B, S), (B, S) integers -> the hidden states below the head, (B, S, D): see ``logits``.

        Where ``model`` takes hidden states: those, (B, S, D), instead of ``input_ids``.
        """
        return self.model(input_ids, position_ids, context)  # type: ignore[no-any-return]

    def prepare(self, key_start: Tensor, key_stop: Tensor, prepare: Prepare) -> Any:
        return self.model.prepare(key_start, key_stop, prepare)

    @property
    def takes_cache(self) -> bool:
        return True

    def set_attention(self, attend: Attend) -> None:
        for module in self.modules():
            if isinstance(module, CoreAttention):
                module.attend = attend

    def layers(self) -> list[nn.Module]:
        return list(self.model.layers.children())

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the embedding's where the head is tied to it."""
        owner = self.model.embed_tokens if self.lm_head is None else self.lm_head
        assert owner is not None, "this part of the model has no head"
        return weight_in_use(owner)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V)."""
        logits = F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)
        return self.head_form.applied(logits)

    @property
    def head_form(self) -> HeadForm:
        return HeadForm(softcap=self.config.logits_softcap)

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
        return (DecoderLayer,)
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
