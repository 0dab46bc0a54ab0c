"""A micro-batch in, its response tokens' log-probabilities out: the plain Llama with its head's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from nxdt_align.batch import PADDING_SEGMENT, Batch
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.parallelize import reduce_gradients, whole_rows
from nxdt_align.engines.native.precision import Precision
from nxdt_align.engines.steps import Share, TokenLogps
from nxdt_align.models.llama import Llama
from nxdt_align.ops.attention import Attention
from nxdt_align.ops.logprobs import VocabShard, token_logps
from nxdt_align.ops.ragged import RaggedRow


class Scorer(nn.Module):
    """A Llama that is asked for log-probabilities alone, so that no caller ever sees its logits."""

    def __init__(
        self,
        llama: Llama,
        attention: Attention,
        precision: Precision,
        device: torch.device,
        groups: Groups = Groups(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.llama = llama
        self._attention = attention
        self._precision = precision
        self._device = device
        self._groups = groups

    def forward(self, batch: Batch, want_collisions: bool) -> TokenLogps:
        if not self._attention.static_shapes:
            return self._ragged(RaggedRow.of(batch), want_collisions)
        hidden = self._hidden(batch.input_ids, batch.position_ids, batch.segment_ids)
        index = batch.response_positions[:, :, None].expand(-1, -1, hidden.shape[-1])
        is_eager = self._device.type == "cpu"
        return self._head(hidden.gather(1, index), batch.labels, want_collisions, compact=is_eager)

    def _ragged(self, row: RaggedRow, want_collisions: bool) -> TokenLogps:
        """As ``forward``, over the batch's real tokens alone."""
        hidden = self._hidden(row.input_ids, row.position_ids, row.segment_ids)[0]
        at_responses = hidden.index_select(0, row.response_positions)
        logps, collisions = self._head(at_responses, row.labels, want_collisions)
        return TokenLogps(row.spread(logps), None if collisions is None else row.spread(collisions))

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """(B, S) each -> (B, S, D), or a little longer: rows are padded to what sequence parallel cuts."""
        missing = -input_ids.shape[1] % self._groups.row_multiple
        if missing:
            input_ids, position_ids = pad(input_ids, (0, missing)), pad(position_ids, (0, missing))
            segment_ids = pad(segment_ids, (0, missing), value=PADDING_SEGMENT)
        with self._precision.context(self._device):
            context = self._attention.prepare(segment_ids)
            hidden: Tensor = self.llama(input_ids, position_ids, context)
        return whole_rows(hidden, self._groups)

    def _head(
        self, at_responses: Tensor, labels: Tensor, want_collisions: bool, *, compact: bool = False
    ) -> TokenLogps:
        """(..., D), (...) -> (...). Outside of autocast, so that products are accumulated in float32."""
        weight, tensor = self.llama.head_weight, self._groups.tensor
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        shard = VocabShard(tensor.rank * own.shape[0], tensor.largest, tensor.summed)
        logps, collisions = token_logps(
            at_responses.float() if self._precision.autocast else at_responses,
            own,
            labels,
            shard=shard,
            compact=compact,
            want_collisions=want_collisions,
        )
        return TokenLogps(logps, collisions)


class WholeRunner:
    """A Runner for a model whose layers are all here: one micro-batch after the other.

    Args:
        reduce_once: where the model is an FSDP module, keep its weights gathered until the last
            micro-batch's backward pass, which reduces the sum of all gradients.
    """

    def __init__(self, scorer: Scorer, *, reduce_once: bool = False) -> None:
        self._scorer = scorer
        self._reduces_once = reduce_once and isinstance(scorer, FSDPModule)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Batch], *, want_collisions: bool) -> list[TokenLogps]:
        return [self._scorer(batch, want_collisions) for batch in micro_batches]

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, want_collisions: bool
    ) -> list[TokenLogps]:
        results = []
        for index, batch in enumerate(micro_batches):
            if self._reduces_once:
                reduce_gradients(self._scorer, now=index == len(micro_batches) - 1)
            result = self._scorer(batch, want_collisions)
            share(index, result).backward()  # type: ignore[no-untyped-call]
            collisions = result.collisions
            results.append(
                TokenLogps(result.logps.detach(), None if collisions is None else collisions.detach())
            )
        return results
