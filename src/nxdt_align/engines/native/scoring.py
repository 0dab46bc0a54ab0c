"""A micro-batch in, its response tokens' log-probabilities out: the plain Llama with its head's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nxdt_align.batch import Batch
from nxdt_align.engines.native.precision import Precision
from nxdt_align.engines.steps import Share, TokenLogps
from nxdt_align.models.llama import Llama
from nxdt_align.ops.attention import Attention
from nxdt_align.ops.logprobs import token_logps
from nxdt_align.ops.ragged import RaggedRow


class Scorer(nn.Module):
    """A Llama that is asked for log-probabilities alone, so that no caller ever sees its logits."""

    def __init__(
        self, llama: Llama, attention: Attention, precision: Precision, device: torch.device
    ) -> None:
        super().__init__()
        self.llama = llama
        self._attention = attention
        self._precision = precision
        self._device = device

    def forward(self, batch: Batch, want_collisions: bool) -> TokenLogps:
        if not self._attention.static_shapes:
            return self._ragged(RaggedRow.of(batch), want_collisions)
        with self._precision.context(self._device):
            context = self._attention.prepare(batch.segment_ids)
            hidden = self.llama(batch.input_ids, batch.position_ids, context)
        # Outside of autocast, so that the head's product is accumulated in float32.
        index = batch.response_positions[:, :, None].expand(-1, -1, hidden.shape[-1])
        at_responses = hidden.gather(1, index)
        logps, collisions = token_logps(
            at_responses.float() if self._precision.autocast else at_responses,
            self.llama.head_weight,
            batch.labels,
            compact=self._device.type == "cpu",
            want_collisions=want_collisions,
        )
        return TokenLogps(logps, collisions)

    def _ragged(self, row: RaggedRow, want_collisions: bool) -> TokenLogps:
        """As ``forward``, over the batch's real tokens alone."""
        with self._precision.context(self._device):
            context = self._attention.prepare(row.segment_ids)
            hidden = self.llama(row.input_ids, row.position_ids, context)[0]
        at_responses = hidden.index_select(0, row.response_positions)
        logps, collisions = token_logps(
            at_responses.float() if self._precision.autocast else at_responses,
            self.llama.head_weight,
            row.labels,
            want_collisions=want_collisions,
        )
        return TokenLogps(row.spread(logps), None if collisions is None else row.spread(collisions))


class WholeRunner:
    """A Runner for a model whose layers are all here: one micro-batch after the other."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Batch], *, want_collisions: bool) -> list[TokenLogps]:
        return [self._scorer(batch, want_collisions) for batch in micro_batches]

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, want_collisions: bool
    ) -> list[TokenLogps]:
        results = []
        for index, batch in enumerate(micro_batches):
            result = self._scorer(batch, want_collisions)
            share(index, result).backward()  # type: ignore[no-untyped-call]
            collisions = result.collisions
            results.append(
                TokenLogps(result.logps.detach(), None if collisions is None else collisions.detach())
            )
        return results
