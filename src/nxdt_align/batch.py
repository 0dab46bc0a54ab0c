"""Batch and Topology: the static-shape tensors that travel between data, engines and losses.

Legend: ``B`` rows, ``S`` tokens per row, ``R`` response slots per row, ``T`` response positions per row.

A *slot* is one response. Read row by row, the slots of preference data alternate: slot ``2k`` is the
chosen and slot ``2k + 1`` the rejected response of one pair, whatever the layout, so a loss finds a
pair by position and never by a data-dependent index. Empty places come in whole pairs too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

IGNORE_LABEL = -100
"""Label of a response position that holds no response token."""

INT32_DEVICES = ("neuron", "xla")
"""Types of devices that compute with 32-bit integers, whatever they are given."""

TokenStatistic = Literal["collisions", "entropy", "mean_logit", "is_top1", "top1", "logits"]
"""What else can be read off the logits while they are there, a value per position, float32, without gradient:
log of the summed squared probabilities (WPO), the distribution's entropy in nats, the mean of the logits over
the vocabulary, whether the label has the largest logit (1 or 0), and the token that has it (the first of
equal ones; its id is exact up to 2**24). Or the logits themselves, with gradient, a vocabulary per position,
where an engine has them whole."""

TOKEN_STATISTICS: tuple[TokenStatistic, ...] = ("entropy", "mean_logit", "is_top1")
"""What is logged of the responses' tokens on request; no loss reads it."""


class SlotRole(IntEnum):
    """What the response of a slot is to the loss."""

    CHOSEN = 0
    REJECTED = 1
    SINGLE = 2
    KL = 3


@dataclass(frozen=True)
class Topology:
    """Where this process stands. Data-parallel ranks see different rows; the others share them.

    All fields are plain integers, so that data code needs no process group.
    """

    world_size: int = 1
    rank: int = 0
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    pipeline_parallel_size: int = 1
    pipeline_parallel_rank: int = 0

    @classmethod
    def of_rank(
        cls, rank: int, world_size: int, *, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
    ) -> Topology:
        """Neighbouring ranks share a layer's matrices (they talk most); then come data-parallel ranks,
        and stages of the pipeline are farthest apart. The order is neuronx-distributed's."""
        data_parallel_size = world_size // (tensor_parallel_size * pipeline_parallel_size)
        data_and_pipeline, tensor = divmod(rank, tensor_parallel_size)
        pipeline, data = divmod(data_and_pipeline, data_parallel_size)
        return cls(
            world_size=world_size,
            rank=rank,
            data_parallel_size=data_parallel_size,
            data_parallel_rank=data,
            tensor_parallel_size=tensor_parallel_size,
            tensor_parallel_rank=tensor,
            pipeline_parallel_size=pipeline_parallel_size,
            pipeline_parallel_rank=pipeline,
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Every size is static for a bucket; every count is a tensor.

    The global batch is the unit that the loss is a mean over; ``global_pairs`` and
    ``global_tokens`` are its sizes over all rows, micro-batches and ranks.
    """

    input_ids: Tensor
    """(B, S) int64. Padding holds any valid token id."""
    position_ids: Tensor
    """(B, S) int64. Of the token in its sequence: restarts with each example; a response continues its
    prompt's, also where it is laid last token first."""
    key_start: Tensor
    """(B, S) int32. The first token of the row that a token attends to."""
    key_stop: Tensor
    """(B, S) int32. One past the last. Padding sees itself alone: [s, s + 1). It comes last in a row."""
    response_positions: Tensor
    """(B, T) int64. Index into the row from which a response token is predicted. A response's labels stand in
    reading order; where it is laid last token first, its positions descend."""
    labels: Tensor
    """(B, T) int64. The token predicted there (already shifted); IGNORE_LABEL where there is none."""
    slot_index: Tensor
    """(B, T) int64. The slot, 0 to R-1, that the response token counts for; R more where it is a token of
    that slot's prompt, which only a likelihood of prompt and response counts."""
    slot_valid: Tensor
    """(B, R) bool. False for an empty place."""
    slot_role: Tensor
    """(B, R) int64, a SlotRole."""
    desirable: Tensor
    """(B, R) bool. KTO's label; True for preference data."""
    record_index: Tensor
    """(B, R) int64. Which record of the data set a slot belongs to; -1 for an empty place."""
    global_pairs: Tensor
    """() float32. Examples (pairs; single responses for SFT and KTO) in the global batch."""
    global_tokens: Tensor
    """() float32. Response tokens in the global batch."""
    reference_logps: Tensor | None = None
    """(B, R) float32, nats. From the reference store; None where the loss needs none or the engine
    computes it."""
    token_weights: Tensor | None = None
    """(B, T) float32. What each response token counts in a response's log-probability, the policy's and
    the reference's; None for 1 each."""

    @property
    def num_rows(self) -> int:
        return int(self.input_ids.shape[0])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """A batch with ``fn`` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped = {name: None if v is None else fn(v) for name, v in values.items()}
        return Batch(**mapped)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``; its integers as int32 where that is a Neuron device, by either stack."""
        narrow = torch.device(device).type in INT32_DEVICES

        def move(tensor: Tensor) -> Tensor:
            if narrow and tensor.dtype == torch.int64:
                tensor = tensor.to(torch.int32)
            # Not as a scalar: XLA makes constants of 0 and 1, so that other counts are other graphs.
            there = (tensor if tensor.ndim else tensor.reshape(-1)).to(device, non_blocking=True)
            return there if tensor.ndim else there.reshape(())

        return self.map(move)

    def pin_memory(self) -> Batch:
        return self.map(lambda t: t.pin_memory())

    def with_reference(self, logps: Tensor) -> Batch:
        """The batch with ``logps``, (B, R), as its reference log-probabilities."""
        if logps.shape != self.slot_valid.shape:
            raise ValueError(
                f"reference log-probs must have the slots' shape {tuple(self.slot_valid.shape)}, "
                f"but have {tuple(logps.shape)}"
            )
        return replace(self, reference_logps=logps)

    def with_tail_weight(self, weight: float) -> Batch:
        """The batch of pairs whose log-probs count tokens beyond the shorter response of a pair ``weight``.

        LD-DPO's decomposition (https://arxiv.org/abs/2409.06411): of responses of 5 and 3
        tokens, the last two of the first count ``weight``.
        """
        has_label = self.labels != IGNORE_LABEL
        slots = torch.arange(self.slot_valid.shape[1], device=self.labels.device)
        in_slot = (self.slot_index[:, :, None] == slots) & has_label[:, :, None]
        shorter = in_slot.sum(1).reshape(-1, 2).min(1, keepdim=True).values.expand(-1, 2)
        slot = self.slot_index.clamp(max=self.slot_valid.shape[1] - 1)
        shared = shorter.reshape(self.slot_valid.shape).gather(1, slot)
        number = (in_slot.cumsum(1) * in_slot).sum(2)
        return replace(self, token_weights=torch.where(has_label & (number > shared), weight, 1.0))

    def responses_of_tokens(self) -> Tensor:
        """(B, S) float32: how many responses each token is part of, as one of its tokens or of its prompt's.

        2 for a prompt that two responses share, 0 for padding and for responses that nothing is trained on.

        A response's last token that predicts sees all of them.
        """
        slots = self.slot_valid.shape[1]
        number = torch.arange(self.labels.shape[1], device=self.labels.device)
        of_slot = torch.arange(slots, device=self.labels.device)
        is_there = (self.slot_index[:, :, None] == of_slot) & (self.labels != IGNORE_LABEL)[:, :, None]
        last = torch.where(is_there, number[:, None], 0).amax(1)  # (B, R)
        position = self.response_positions.gather(1, last)
        start, stop = (bound.gather(1, position)[:, :, None] for bound in (self.key_start, self.key_stop))
        token = torch.arange(self.input_ids.shape[1], device=self.labels.device)
        is_trained = self.slot_valid & (self.slot_role != SlotRole.KL)
        sees = (token >= start) & (token < stop) & is_trained[:, :, None]
        return sees.sum(1, dtype=torch.float32)

    def share_of_examples(self) -> Tensor:
        """() float32: these rows' share of the global batch's examples; over all micro-batches they add up to
        1."""
        is_one = (self.slot_role == SlotRole.CHOSEN) | (self.slot_role == SlotRole.SINGLE)
        return (self.slot_valid & is_one).sum(dtype=torch.float32) / self.global_pairs

    def sum_logps(self, token_logps: Tensor) -> Tensor:
        """Each slot's log-probability, (B, R), from those of its tokens, (B, T), by ``token_weights``."""
        weights = self.token_weights
        return self.sum_per_slot(token_logps if weights is None else token_logps * weights)

    def sum_per_slot(self, values: Tensor) -> Tensor:
        """Sum ``values``, (B, T), over each slot's response tokens: (B, R), in ``values``' dtype.

        A one-hot product rather than a scatter: deterministic, and static on XLA. Values at
        positions without a label must be finite; they do not count.
        """
        return self._sum_from(0, values)

    def sum_per_prompt(self, values: Tensor) -> Tensor:
        """As ``sum_per_slot``, over the tokens of each slot's prompt: 0 where the batch has none of them."""
        return self._sum_from(self.slot_valid.shape[1], values)

    def _sum_from(self, first: int, values: Tensor) -> Tensor:
        slots = torch.arange(
            first, first + self.slot_valid.shape[1], dtype=self.slot_index.dtype, device=values.device
        )
        counts_for = (self.slot_index[:, :, None] == slots) & (self.labels != IGNORE_LABEL)[:, :, None]
        return torch.where(counts_for, values[:, :, None], 0.0).sum(1)


def concat_rows(batches: Sequence[Batch]) -> Batch:
    """One batch of all rows, which must agree in S, T, R and in their global counts."""
    if not batches:
        raise ValueError("concat_rows needs at least one batch")
    merged: dict[str, Tensor | None] = {}
    for f in fields(Batch):
        parts = [getattr(b, f.name) for b in batches]
        if parts[0] is None:
            merged[f.name] = None
        elif parts[0].ndim == 0:
            merged[f.name] = parts[0]
        else:
            merged[f.name] = torch.cat(parts, 0)
    return Batch(**merged)  # type: ignore[arg-type]
