"""Bytes that a decoder's forward pass keeps for its backward pass, and temporary bytes.

docs/memory.md derives the terms; ``workload.py`` has the legend.
"""

from __future__ import annotations

from nxdt_align.planning.adapters import (
    dequantised_weight,
    kept_by_factors,
    norms_scratch,
    unkept_of_layer,
)
from nxdt_align.planning.workload import FLOAT, Workload


def kept_of_layer(work: Workload) -> int:
    """What a layer keeps for its backward pass."""
    if "full" in work.recompute:
        return work.residual_positions * work.model.hidden_size * work.formats.residual
    kept = _norms(work) + _inputs(work) + _attention(work) + _mlp(work)
    return kept - unkept_of_layer(work) + kept_by_factors(work)


def _whole_layer(work: Workload) -> int:
    """A layer that recomputes nothing."""
    parts = (_norms(work, whole=True), _inputs(work, whole=True))
    kept = sum(parts) + _attention(work, whole=True) + _mlp(work, whole=True)
    return kept - unkept_of_layer(work, whole=True) + kept_by_factors(work, whole=True)


def _norms(work: Workload, whole: bool = False) -> int:
    """Those of the residual stream, before or after attention and MLP or both, and those of q and k."""
    count = 4 if work.model.norms == "both" else 2
    return count * _norm(work, whole) + _head_norms(work, whole)


def _head_norms(work: Workload, whole: bool) -> int:
    if work.model.qk_norm is None:
        return 0
    heads = work.heads + work.own_kv_heads
    size = work.positions * heads * work.model.head_dim
    if "LlamaRMSNorm" in work.recompute and not whole:
        return size * work.formats.activation
    return size * (FLOAT + _normed(work, work.formats.activation)) + work.positions * heads * FLOAT


def _normed(work: Workload, size: int) -> int:
    """Bytes of a normed value: float32 where the weight is 1 + w, as the product is."""
    return FLOAT if work.model.norm_offset else size


def _norm(work: Workload, whole: bool = False) -> int:
    """The input in float32 and the normed values, or the input alone."""
    positions, hidden = work.residual_positions, work.model.hidden_size
    if "LlamaRMSNorm" in work.recompute and not whole:
        return positions * hidden * work.formats.residual
    # RMSNorm computes in float32 and saves that input, the normed values and one rsqrt per token.
    return positions * (hidden * (FLOAT + _normed(work, work.formats.residual)) + FLOAT)


def _inputs(work: Workload, whole: bool = False) -> int:
    """Inputs of the projections: one tensor shared by q, k, v and one by gate, up."""
    formats = work.formats
    positions = work.positions if work.keeps_gathered else work.residual_positions
    size = positions * work.model.hidden_size
    is_mlp_kept = "LlamaMLP" not in work.recompute or whole
    if not formats.autocast:
        return 2 * size * formats.activation
    # torch.autocast casts the input once per projection, q, k, v, gate, up, and caches its casts of the
    # weights until the context ends.
    attention_weights, mlp_weights = _product_weights(work)
    into_mlp = (2 * size + mlp_weights) * formats.activation if is_mlp_kept else size * FLOAT
    return (3 * size + attention_weights) * formats.activation + into_mlp


def _product_weights(work: Workload) -> tuple[int, int]:
    """Parameter counts of a layer's attention and MLP projections."""
    hidden, head = work.model.hidden_size, work.model.head_dim
    return 2 * hidden * head * (work.heads + work.own_kv_heads), 3 * hidden * work.width


def _attention(work: Workload, whole: bool = False) -> int:
    """Queries, keys and values as the kernel takes them, its result, and scores or mask."""
    n, size, head = work.positions, work.formats.activation, work.model.head_dim
    out = n * work.heads * head * size
    if "CoreAttention" in work.recompute and not whole:
        return out + n * (work.heads + 2 * work.own_kv_heads) * head * size
    return out + _kernel(work)


def _kernel(work: Workload) -> int:
    """Keys and values are repeated to the queries' heads, but for scores. Of these the softmax keeps a
    float32 copy, and the product with the values another in a lower precision."""
    n, head = work.positions, work.model.head_dim
    pairs = n * work.tokens
    if work.attention == "scores":
        size = work.formats.activation
        copies = FLOAT + (size if size < FLOAT else 0)
        if work.model.attention_softcap is not None:
            copies += FLOAT  # the tanh of the scores
        return n * (work.heads + 2 * work.own_kv_heads) * head * size + pairs * work.heads * copies
    inputs = n * work.heads * (3 * head * work.formats.activation + FLOAT)
    # The fused kernel saves one logsumexp per query and head (the FLOAT above), not the scores.
    return inputs + (pairs * work.formats.activation if work.attention == "masked" else 0)


def _mlp(work: Workload, whole: bool = False) -> int:
    """Gate, its activation, up, and their product, which the last projection takes."""
    one = work.positions * work.width * work.formats.activation
    if whole:
        return 4 * one
    if "LlamaMLP" in work.recompute:
        return 0
    # The checkpointed silu(gate) * up keeps its inputs and its output; silu(gate) is recomputed.
    return (3 if "ActivationMultiplyMLP" in work.recompute else 4) * one


def held_by_model(work: Workload) -> int:
    """Rotary angles, cos and sin, the mask, and the batch itself."""
    # cos and sin are float32 whatever the model computes in.
    rotary = 2 * work.positions * work.model.head_dim * FLOAT
    # A boolean mask, one byte per query-key pair.
    mask = 0 if work.attention in ("flash", "intervals") else work.positions * work.tokens
    return rotary + mask + 8 * (3 * work.positions + 3 * work.rows * work.responses)


def _vocabulary(work: Workload) -> int:
    return -(-work.model.vocab_size // work.tensor_parallel)


# Temporary memory


def layer_scratch(work: Workload, largest_weight: int) -> int:
    """The backward pass of one layer: what it recomputes, and gradients; or a forward pass, before those."""
    size = work.formats.activation
    residual = 2 * work.residual_positions * work.model.hidden_size * work.formats.residual
    gathered = work.positions * work.model.hidden_size * size if work.sequence_parallel else 0
    of_weight = largest_weight * max(size, work.formats.weight)
    if work.adapters is not None:
        of_weight = dequantised_weight(work, largest_weight)  # no gradient
    backward = max(_in_mlp(work), _in_attention(work))
    forward = _recomputed(work) + norms_scratch(work, largest_weight)
    return residual + gathered + of_weight + max(backward, forward)


def _recomputed(work: Workload) -> int:
    """The largest part of a layer that is recomputed at once, attention's kernel aside."""
    recomputed = {
        "full": _whole_layer(work),
        "LlamaMLP": _mlp(work, whole=True) + kept_by_factors(work, whole=True) - kept_by_factors(work),
        "LlamaRMSNorm": _norm(work, whole=True),
        "ActivationMultiplyMLP": work.positions * work.width * work.formats.activation,
    }
    return max((recomputed.get(name, 0) for name in work.recompute), default=0)


def _in_mlp(work: Workload) -> int:
    """Two gradients, of the factors of gate * up: the product's own gradient reuses its memory."""
    return _recomputed(work) + 2 * work.positions * work.width * work.formats.activation


def _in_attention(work: Workload) -> int:
    """Negative terms: what the layer kept for its MLP and second norm is already free."""
    is_full = "full" in work.recompute
    freed = _mlp(work, whole=is_full) + _norm(work, whole=is_full)
    recomputed = _whole_layer(work) if is_full else 0
    if "CoreAttention" in work.recompute:
        recomputed = _kernel(work)
    return recomputed + _attention_gradients(work) - freed


def _attention_gradients(work: Workload) -> int:
    """Of queries, keys, values and result; with scores, of the softmax's input and output, by when the copy
    in a lower precision is free again."""
    n, size = work.positions, work.formats.activation
    if work.attention == "scores":
        of_scores = 2 * FLOAT - (size if size < FLOAT else 0)
        return (4 * n * work.model.head_dim * size + n * work.tokens * of_scores) * work.heads
    return 4 * n * work.heads * work.model.head_dim * size


def above_layers(work: Workload, head: int) -> int:
    """Last norm, hidden states at the responses, probabilities, a tile of logits, and float32 gradients of
    head and hidden states; in a lower precision also the low-precision product and its float32 copy."""
    formats, at_responses = work.formats, work.rows * work.responses
    hidden = at_responses * work.model.hidden_size
    logits = at_responses * _vocabulary(work) * FLOAT
    kept = hidden * (FLOAT if formats.autocast else formats.activation) + min(work.kept, logits)
    besides = 0 if formats.weight == FLOAT else FLOAT + formats.weight
    is_head_trained = work.adapters is None or "lm_head" in work.adapters.saved
    graded = hidden + (head if is_head_trained else 0)
    return _norm(work) + kept + min(work.tile, logits) + graded * (FLOAT + besides)
