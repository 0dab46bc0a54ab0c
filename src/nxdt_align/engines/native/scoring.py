"""A micro-batch in, its response tokens' log-probabilities out: the plain Llama with its head's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from nxdt_align.batch import PADDING_SEGMENT, Batch, TokenStatistic
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.parallelize import reduce_gradients, whole_rows
from nxdt_align.engines.native.settings import Precision
from nxdt_align.engines.steps import Share, TokenLogps
from nxdt_align.models.llama import Llama
from nxdt_align.ops.attention import Attention
from nxdt_align.ops.logprobs import VocabShard, token_logps
from nxdt_align.ops.ragged import ModelInputs, PaddedRows, RaggedRow, Rows


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

    def forward(self, batch: Batch, wanted: Sequence[TokenStatistic]) -> TokenLogps:
        rows = self.rows(ModelInputs.of(batch))
        logps, statistics, logits = self.read(self.run(rows.input_ids, rows), rows, wanted)
        # FSDP hangs its backward hooks on a module's output, which must not be a view.
        return TokenLogps(logps.clone(), statistics, None if logits is None else logits.clone())

    def rows(self, inputs: ModelInputs) -> Rows:
        """The tokens that the layers run over: without padding where shapes may follow the data."""
        return PaddedRows(inputs) if self._attention.static_shapes else RaggedRow.of(inputs)

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        """The layers that are here, over the rows' token ids or over hidden states of an earlier part.

        Returns (B, S, D), or this rank's (B, S / tp, D) under sequence parallel, which rows are padded for.
        """
        position_ids, segment_ids = rows.position_ids, rows.segment_ids
        missing = -segment_ids.shape[1] % self._groups.parallel.row_multiple
        if missing:
            x = pad(x, (0, missing)) if x is rows.input_ids else x
            position_ids = pad(position_ids, (0, missing))
            segment_ids = pad(segment_ids, (0, missing), value=PADDING_SEGMENT)
        with self._precision.context(self._device):
            context = self._attention.prepare(segment_ids)
            hidden: Tensor = self.llama(x, position_ids, context)
        return hidden

    def read(self, hidden: Tensor, rows: Rows, wanted: Sequence[TokenStatistic]) -> TokenLogps:
        """The head, over what ``run`` gives where the last layer and the norm are."""
        # Outside of autocast, so that the head's product is accumulated in float32.
        at_responses = rows.at_responses(whole_rows(hidden, self._groups))
        weight, tensor = self.llama.head_weight, self._groups.tensor
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        at_responses = at_responses.float() if self._precision.autocast else at_responses
        logits = None
        if "logits" in wanted:
            if tensor.size > 1:
                raise EngineError("each tensor-parallel rank has a part of the vocabulary's logits alone")
            logits = rows.spread((at_responses @ own.T.to(at_responses.dtype)).float())
        logps, statistics = token_logps(
            at_responses,
            own,
            rows.labels,
            shard=VocabShard(tensor.rank * own.shape[0], tensor.largest, tensor.summed),
            compact=self._attention.static_shapes and self._device.type == "cpu",
            wanted=[name for name in wanted if name != "logits"],
        )
        return TokenLogps(
            rows.spread(logps), tuple(rows.spread(statistic) for statistic in statistics), logits
        )


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
    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        return [self._scorer(batch, wanted) for batch in micro_batches]

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        results = []
        for index, batch in enumerate(micro_batches):
            if self._reduces_once:
                reduce_gradients(self._scorer, now=index == len(micro_batches) - 1)
            result = self._scorer(batch, wanted)
            share(index, result).backward()  # type: ignore[no-untyped-call]
            results.append(result.detach())
        return results
