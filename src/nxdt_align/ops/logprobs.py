"""Token log-probabilities from hidden states and the head, without ever holding a row's logits.

The logits exist a tile at a time, in float32, in the forward pass and again (recomputed) in the
backward pass. For 8,192 positions and a vocabulary of 128,256 a tile takes 128 MB at most, against
4.2 GB for all logits; the probabilities of the first tiles, up to KEPT_BYTES, are kept instead of
being recomputed.

Legend: ``M`` positions, ``D`` hidden, ``V`` vocabulary (this rank's part of it), ``C`` and ``W`` the
positions and the vocabulary of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, TokenStatistic

CHUNK_BYTES = 2**27
"""Size of one tile's float32 logits: large enough for full matrix-multiply speed."""
CACHED_BYTES = 2**23
"""The same on a CPU: what is computed of a tile's logits then finds them in the cache."""
KEPT_BYTES = 2**28
"""float32 probabilities that are kept for the backward pass: what fits is not multiplied again, which
is a quarter of the head's work."""


def _identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary and the reductions over the ranks that hold the others.

    The default is the whole vocabulary on one rank.
    """

    start: int | Tensor = 0
    """First token id of this rank's rows of the head. Where a step is a compiled graph: (1,) integer, on the
    device, as a number would make each rank's graph another one."""
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
    wanted: Sequence[TokenStatistic] = (),
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """log p(label | hidden) at each position, and what is ``wanted`` beside it.

    Args:
        hidden: (B, T, D), any float dtype: hidden states at the response positions.
        head: (V, D): the output embedding, or this rank's rows of it.
        labels: (B, T) int64; IGNORE_LABEL gives 0, with gradient 0.
        shard: which rows of the vocabulary ``head`` holds.
        compact: drop ignored positions before the head. Faster, but the shapes then depend on the
            data: right for eager devices, wrong where a shape is a compiled graph.
        wanted: further values, without gradient, see ``batch.TokenStatistic``; not the logits, which are a
            product of ``hidden`` and ``head`` that is never whole here. Raises ValueError where they are
            asked for.
        bias: (V,): of the head, or of this rank's rows of it.
        scale: of the head's products, with their bias.
        softcap: logits x are cap * tanh(x / cap) instead.

    Returns:
        (B, T) float32 nats, and a (B, T) float32 for each of ``wanted``; 0 at ignored positions.
    """
    if "logits" in wanted:
        raise ValueError("logits are never whole here: multiply the hidden states by the head")
    shape = labels.shape
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    form = _Form(scale, softcap)
    if not compact:
        logps, *statistics = _tiled_logps(flat_hidden, head, bias, flat_labels, shard, wanted, form)
        return logps.view(shape), tuple(statistic.view(shape) for statistic in statistics)

    kept = torch.nonzero(flat_labels != IGNORE_LABEL).squeeze(1)
    logps, *statistics = _tiled_logps(
        flat_hidden.index_select(0, kept),
        head,
        bias,
        flat_labels.index_select(0, kept),
        shard,
        wanted,
        form,
    )
    zeros = torch.zeros(flat_labels.shape, dtype=torch.float32, device=labels.device)
    spread = zeros.index_copy(0, kept, logps).view(shape)
    return spread, tuple(zeros.index_copy(0, kept, statistic).view(shape) for statistic in statistics)


def chunk_size(vocabulary: int) -> int:
    """Positions a tile over the whole vocabulary: static for a vocabulary, a multiple of 64."""
    return max(64, CHUNK_BYTES // (4 * vocabulary) // 64 * 64)


def _tile_sizes(positions: int, vocabulary: int, device: torch.device) -> tuple[int, int]:
    """C and W. An accelerator's tile spans the vocabulary; a CPU's spans positions, as far as the
    matrix unit gains by it, so that each row of the head's gradient is written once."""
    if device.type != "cpu":
        return chunk_size(vocabulary), vocabulary
    rows = max(1, min(positions, 1024))
    return rows, min(vocabulary, max(64, CACHED_BYTES // (4 * rows) // 64 * 64))


def _parts(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


@dataclass(frozen=True)
class _Form:
    """What becomes of the products x of hidden states and head: cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    softcap: float | None = None


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, form: _Form) -> Tensor:
    """(C, W) float32."""
    logits = _product(hidden, head.T)
    if bias is not None:
        logits = logits.add_(bias)
    if form.scale != 1:
        logits = logits.mul_(form.scale)
    cap = form.softcap
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(M, K) @ (K, N), float32. Low-precision operands are multiplied with float32 accumulation and
    result."""
    if left.dtype == torch.float32 and right.dtype == torch.float32:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.device.type == "cpu":
        return left.float() @ right.float()
    return (left @ right).float()


def _labels_in(labels: Tensor, part: slice, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Column of each label in these rows of the head, (C,), and whether it is there, (C,) bool."""
    local = labels - shard.start - part.start
    held = (labels != IGNORE_LABEL) & (local >= 0) & (local < part.stop - part.start)
    return torch.where(held, local, 0), held


def _tiled_logps(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    shard: VocabShard,
    wanted: Sequence[TokenStatistic],
    form: _Form,
) -> tuple[Tensor, ...]:
    """(M, D), (V, D), (V,), (M,) -> (M,) float32, and as much for each of ``wanted``."""
    result: tuple[Tensor, ...] = _TiledLogps.apply(  # type: ignore[no-untyped-call]
        hidden, head, bias, labels, shard, tuple(wanted), form
    )
    return result


class _Scan:
    """What is summed over the vocabulary while its tiles go by, at C positions: (C,) float32 each."""

    def __init__(self, positions: int, device: torch.device, wanted: Sequence[TokenStatistic]) -> None:
        self.wanted = wanted
        self.top = torch.full((positions,), float("-inf"), device=device)
        self.norm, self.target, self.squares, self.weighted = torch.zeros(4, positions, device=device)
        # Made where it is wanted alone, so that graphs of steps are what they are without it.
        self.best = torch.zeros(positions, dtype=torch.int64, device=device) if "top1" in wanted else None
        """Token of the largest logit so far."""
        self.total = torch.zeros(positions, device=device)
        """Sum of the logits, where ``sums`` is set."""
        self.sums = False

    def add(self, logits: Tensor, column: Tensor, held: Tensor, first: int | Tensor) -> tuple[Tensor, Tensor]:
        """Take a tile, (C, W), whose storage may be written to and whose first token is ``first``. Returns
        exp(logits - its own top), and that top."""
        tile_top = logits.amax(-1)
        if self.best is not None:
            self.best = torch.where(tile_top > self.top, logits.argmax(-1) + first, self.best)
        picked = logits.gather(1, column[:, None]).squeeze(1)
        self.target = torch.where(held, picked, self.target)
        if self.sums:
            self.total = self.total + logits.sum(-1)
        if "entropy" in self.wanted:
            exps = torch.sub(logits, tile_top[:, None]).exp_()
            weighted = logits.mul_(exps).sum(-1)
        else:
            exps = logits.sub_(tile_top[:, None]).exp_()
            weighted = None
        top = torch.maximum(self.top, tile_top)
        before, now = (self.top - top).exp(), (tile_top - top).exp()
        self.norm = self.norm * before + exps.sum(-1) * now
        if weighted is not None:
            self.weighted = self.weighted * before + weighted * now
        if "collisions" in self.wanted:
            self.squares = self.squares * before.square() + exps.square().sum(-1) * now.square()
        self.top = top
        return exps, tile_top

    def reduced(self, shard: VocabShard) -> tuple[Tensor, Tensor, dict[TokenStatistic, Tensor]]:
        """log-norm, target logit, and of what is wanted what follows from sums over all shards."""
        top = shard.reduce_max(self.top)
        shift = (self.top - top).exp()
        norm = shard.reduce_sum(self.norm * shift)
        log_norm = top + norm.log()
        target = shard.reduce_sum(self.target)
        statistics: dict[TokenStatistic, Tensor] = {}
        if "collisions" in self.wanted:
            statistics["collisions"] = shard.reduce_sum(self.squares * shift.square()).log() - 2 * norm.log()
        if "entropy" in self.wanted:
            statistics["entropy"] = log_norm - shard.reduce_sum(self.weighted * shift) / norm
        if "is_top1" in self.wanted:
            statistics["is_top1"] = (target >= top).float()
        if self.best is not None:
            # The least token of those that have the largest logit, by a maximum.
            found = torch.where(self.top >= top, -self.best.float(), float("-inf"))
            statistics["top1"] = -shard.reduce_max(found)
        return log_norm, target, statistics

    def mean(self, rows: int, shard: VocabShard) -> Tensor:
        """(C,) float32: of the logits whose sum was taken, of ``rows`` of the head here."""
        count = torch.full((1,), float(rows), device=self.total.device)
        summed = shard.reduce_sum(torch.cat([self.total, count]))
        return summed[:-1] / summed[-1]


def _mean_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, shard: VocabShard
) -> Tensor:
    """(M,) float32: the mean of the logits is the logit of the mean row."""
    sums = hidden.float() @ head.sum(0, dtype=torch.float32)
    if bias is not None:
        sums = sums + bias.sum(dtype=torch.float32)
    if scale != 1:
        sums = sums * scale
    rows = torch.full((1,), float(head.shape[0]), device=head.device)
    summed = shard.reduce_sum(torch.cat([sums, rows]))
    return summed[:-1] / summed[-1]


class _TiledLogps(torch.autograd.Function):
    """d logp / d logits = onehot(label) - softmax(logits): kept or recomputed tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shard: VocabShard,
        wanted: tuple[TokenStatistic, ...],
        form: _Form,
    ) -> tuple[Tensor, ...]:
        softcap = form.softcap
        positions, vocabulary = hidden.shape[0], head.shape[0]
        rows, columns = _tile_sizes(positions, vocabulary, hidden.device)
        logps = torch.empty(positions, dtype=torch.float32, device=hidden.device)
        log_norms = torch.empty_like(logps)
        statistics = {name: torch.empty_like(logps) for name in wanted}
        if "mean_logit" in wanted and softcap is None:
            statistics["mean_logit"] = torch.where(
                labels == IGNORE_LABEL, 0.0, _mean_logits(hidden, head, bias, form.scale, shard)
            )
        # The derivative of a cap follows from the logits, not from what is kept.
        room = KEPT_BYTES if any(ctx.needs_input_grad) and softcap is None else 0
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for part in _parts(positions, rows):
            scan = _Scan(part.stop - part.start, hidden.device, wanted)
            scan.sums = "mean_logit" in wanted and softcap is not None
            for tile in _parts(vocabulary, columns):
                placed = _labels_in(labels[part], tile, shard)
                logits = _logits(hidden[part], head[tile], _part_of(bias, tile), form)
                first = 0 if scan.best is None else shard.start + tile.start
                exps, top = scan.add(logits, *placed, first)
                if exps.nbytes <= room:
                    kept[part.start, tile.start] = exps, top
                    room -= exps.nbytes
            ignored = labels[part] == IGNORE_LABEL
            log_norms[part], target, found = scan.reduced(shard)
            if scan.sums:
                found["mean_logit"] = scan.mean(vocabulary, shard)
            logps[part] = torch.where(ignored, 0.0, target - log_norms[part])
            for name, statistic in found.items():
                statistics[name][part] = torch.where(ignored, 0.0, statistic)
        saved = (x for pair in kept.values() for x in pair)
        ctx.save_for_backward(hidden, head, bias, labels, log_norms, *saved)
        ctx.shard, ctx.kept, ctx.sizes, ctx.form = shard, list(kept), (rows, columns), form
        ctx.mark_non_differentiable(*statistics.values())
        return logps, *statistics.values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_statistics: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, labels, log_norms, *saved = ctx.saved_tensors
        kept = dict(zip(ctx.kept, zip(saved[::2], saved[1::2], strict=True), strict=True))
        grad = torch.where(labels == IGNORE_LABEL, 0.0, grad.float())
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        rows, columns = ctx.sizes
        buffer: Tensor | None = None
        for part in _parts(hidden.shape[0], rows):
            for tile in _parts(head.shape[0], columns):
                if (part.start, tile.start) in kept:
                    exps, top = kept[part.start, tile.start]
                    # Not in place: a second backward pass may come.
                    scale = -grad[part] * (top - log_norms[part]).exp()
                    grad_logits = torch.mul(exps, scale[:, None], out=_like(exps, buffer))
                    buffer = grad_logits
                    slope = None
                else:
                    grad_logits = _logits(hidden[part], head[tile], _part_of(bias, tile), ctx.form)
                    cap = ctx.form.softcap
                    slope = None if cap is None else 1 - (grad_logits / cap).square_()
                    grad_logits = grad_logits.sub_(log_norms[part][:, None]).exp_()
                    grad_logits.mul_(-grad[part][:, None])
                column, held = _labels_in(labels[part], tile, ctx.shard)
                grad_logits.scatter_add_(1, column[:, None], torch.where(held, grad[part], 0.0)[:, None])
                if slope is not None:
                    grad_logits.mul_(slope)
                if ctx.form.scale != 1:
                    grad_logits.mul_(ctx.form.scale)
                if grad_bias is not None:
                    grad_bias[tile] += grad_logits.sum(0)
                if grad_hidden is not None:
                    _add_product(grad_hidden[part], grad_logits, head[tile])
                if grad_head is not None:
                    _add_product(grad_head[tile], grad_logits.T, hidden[part])
        # A sharded head gives each rank a part of d hidden: their sum is the gradient.
        if grad_hidden is not None:
            grad_hidden = ctx.shard.reduce_sum(grad_hidden.to(hidden.dtype))
        of_weights = (
            None if grad is None else grad.to(like.dtype)
            for grad, like in ((grad_head, head), (grad_bias, bias))
        )
        return grad_hidden, *of_weights, None, None, None, None


def _part_of(bias: Tensor | None, tile: slice) -> Tensor | None:
    return None if bias is None else bias[tile]


def _like(tile: Tensor, buffer: Tensor | None) -> Tensor:
    """Storage of the tile's shape: the last tile's where it fits, as fresh memory is slow on a CPU."""
    return buffer if buffer is not None and buffer.shape == tile.shape else torch.empty_like(tile)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total`` += ``left`` (float32) @ ``right``, multiplied in ``right``'s dtype on accelerators, in
    float32 on a CPU."""
    if right.dtype == torch.float32 or right.device.type == "cpu":
        total.addmm_(left, right.float())
    else:
        total += _product(left.to(right.dtype), right)
