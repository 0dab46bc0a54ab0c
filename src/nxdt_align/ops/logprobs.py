"""Token log-probabilities from hidden states and the head, without ever holding a row's logits.

The logits exist a chunk of positions at a time, in float32, in the forward pass and again
(recomputed) in the backward pass. For 8,192 positions and a vocabulary of 128,256 a chunk takes
128 MB, against 4.2 GB for all logits.

Legend: ``M`` positions, ``D`` hidden, ``V`` vocabulary (this rank's part of it), ``C`` chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL

CHUNK_BYTES = 2**27
"""Size of one chunk's float32 logits: large enough for full matrix-multiply speed."""


def _identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary and the reductions over the ranks that hold the others.

    The default is the whole vocabulary on one rank.
    """

    start: int = 0
    """First token id of this rank's rows of the head."""
    reduce_max: Callable[[Tensor], Tensor] = _identity
    reduce_sum: Callable[[Tensor], Tensor] = _identity


WHOLE_VOCABULARY = VocabShard()


def token_logps(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard = WHOLE_VOCABULARY,
    compact: bool = False,
    want_collisions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log p(label | hidden) at each position, and on request log(sum over v of p(v)^2).

    Args:
        hidden: (B, T, D), any float dtype: hidden states at the response positions.
        head: (V, D): the output embedding, or this rank's rows of it.
        labels: (B, T) int64; IGNORE_LABEL gives 0, with gradient 0.
        shard: which rows of the vocabulary ``head`` holds.
        compact: drop ignored positions before the head. Faster, but the shapes then depend on the
            data: right for eager devices, wrong where a shape is a compiled graph.
        want_collisions: return the collision term (WPO), without gradient.

    Returns:
        (B, T) float32 nats, and (B, T) float32 or None.
    """
    shape = labels.shape
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if not compact:
        logps, collisions = _chunked_logps(flat_hidden, head, flat_labels, shard, want_collisions)
        return logps.view(shape), collisions.view(shape) if want_collisions else None

    kept = torch.nonzero(flat_labels != IGNORE_LABEL).squeeze(1)
    logps, collisions = _chunked_logps(
        flat_hidden.index_select(0, kept), head, flat_labels.index_select(0, kept), shard, want_collisions
    )
    zeros = torch.zeros(flat_labels.shape, dtype=torch.float32, device=labels.device)
    spread = zeros.index_copy(0, kept, logps).view(shape)
    return spread, zeros.index_copy(0, kept, collisions).view(shape) if want_collisions else None


def chunk_size(vocabulary: int) -> int:
    """Positions a chunk: static for a vocabulary, a multiple of 64."""
    return max(64, CHUNK_BYTES // (4 * vocabulary) // 64 * 64)


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    size = chunk_size(vocabulary)
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """(C, V) float32. Low-precision operands are multiplied with float32 accumulation and result."""
    if hidden.dtype == torch.float32 and head.dtype == torch.float32:
        return hidden @ head.T
    if hidden.device.type == "cuda":
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    if hidden.device.type == "cpu":
        return hidden.float() @ head.float().T
    return (hidden @ head.T).float()


def _local_labels(labels: Tensor, head: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Row of the head for each label, (C,), and whether this rank holds it, (C,) bool."""
    local = labels - shard.start
    held = (labels != IGNORE_LABEL) & (local >= 0) & (local < head.shape[0])
    return torch.where(held, local, 0), held


def _chunked_logps(
    hidden: Tensor, head: Tensor, labels: Tensor, shard: VocabShard, want_collisions: bool
) -> tuple[Tensor, Tensor]:
    """(M, D), (V, D), (M,) -> (M,) and (M,) float32."""
    result: tuple[Tensor, Tensor] = _ChunkedLogps.apply(hidden, head, labels, shard, want_collisions)  # type: ignore[no-untyped-call]
    return result


class _ChunkedLogps(torch.autograd.Function):
    """d logp / d logits = onehot(label) - softmax(logits): recomputed chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, shard: VocabShard, want_collisions: bool
    ) -> tuple[Tensor, Tensor]:
        positions = hidden.shape[0]
        logps = torch.empty(positions, dtype=torch.float32, device=hidden.device)
        log_norms = torch.empty_like(logps)
        collisions = torch.zeros_like(logps)
        for part in _chunks(positions, head.shape[0]):
            logits = _logits(hidden[part], head)
            top = shard.reduce_max(logits.max(dim=-1).values)
            local, held = _local_labels(labels[part], head, shard)
            target = torch.where(held, logits.gather(1, local[:, None]).squeeze(1), 0.0)
            exps = logits.sub_(top[:, None]).exp_()
            norm = shard.reduce_sum(exps.sum(-1))
            ignored = labels[part] == IGNORE_LABEL
            log_norms[part] = top + norm.log()
            logps[part] = torch.where(ignored, 0.0, shard.reduce_sum(target) - log_norms[part])
            if want_collisions:
                squares = shard.reduce_sum(exps.square_().sum(-1))
                collisions[part] = torch.where(ignored, 0.0, squares.log() - 2 * norm.log())
        ctx.save_for_backward(hidden, head, labels, log_norms)
        ctx.shard = shard
        ctx.mark_non_differentiable(collisions)
        return logps, collisions

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _collisions: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, labels, log_norms = ctx.saved_tensors
        grad = torch.where(labels == IGNORE_LABEL, 0.0, grad.float())
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        for part in _chunks(hidden.shape[0], head.shape[0]):
            grad_logits = _logits(hidden[part], head).sub_(log_norms[part][:, None]).exp_()
            grad_logits.mul_(-grad[part][:, None])
            local, held = _local_labels(labels[part], head, ctx.shard)
            grad_logits.scatter_add_(1, local[:, None], torch.where(held, grad[part], 0.0)[:, None])
            if grad_hidden is not None:
                grad_hidden[part] = _matmul_as(grad_logits, head).to(hidden.dtype)
            if grad_head is not None:
                grad_head += _matmul_as(grad_logits.T, hidden[part])
        # A sharded head gives each rank a part of d hidden: their sum is the gradient.
        if grad_hidden is not None:
            grad_hidden = ctx.shard.reduce_sum(grad_hidden)
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None


def _matmul_as(left: Tensor, right: Tensor) -> Tensor:
    """``left`` (float32) @ ``right``, in ``right``'s dtype on accelerators, float32 on a CPU."""
    if right.dtype == torch.float32 or right.device.type == "cpu":
        return left @ right.float()
    return (left.to(right.dtype) @ right).float()
