"""A micro-batch in, its response tokens' log-probabilities out, on this rank's shares of a Llama."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nxdt_align.batch import PADDING_SEGMENT, Batch, TokenStatistic
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.nxd.compat import Platform
from nxdt_align.engines.nxd.settings import Parallel
from nxdt_align.engines.ranks import Group
from nxdt_align.engines.steps import Share, TokenLogps
from nxdt_align.models.llama import Llama
from nxdt_align.ops.attention import Attention
from nxdt_align.ops.logprobs import VocabShard, token_logps


class Scorer(nn.Module):
    """A Llama of NxD's layers that is asked for log-probabilities alone.

    Not through NxD's from_parallel_logits_to_logprobs, which keeps all logits and loses bf16's last
    digits. Every tensor-parallel rank gets the whole result. Shapes are static.
    """

    def __init__(self, llama: Llama, attention: Attention, parallel: Parallel, tensor: Group) -> None:
        super().__init__()
        self.llama = llama
        self.attention = attention
        self._parallel = parallel
        rows = llama.config.vocab_size // tensor.size
        self._shard = VocabShard(tensor.rank * rows, tensor.largest, tensor.summed)

    def forward(self, batch: Batch, wanted: Sequence[TokenStatistic]) -> TokenLogps:
        input_ids, position_ids, segment_ids = self.padded(batch)
        context = self.attention.prepare(segment_ids)
        return self.read(self.llama(input_ids, position_ids, context), batch, wanted)

    def read(self, hidden: Tensor, batch: Batch, wanted: Sequence[TokenStatistic]) -> TokenLogps:
        """The head, over what comes out below it: (B, S, D)."""
        if "logits" in wanted:
            raise EngineError("engine nxd keeps no logits: each rank has a part of the vocabulary's alone")
        index = batch.response_positions[:, :, None].expand(-1, -1, hidden.shape[-1])
        logps, statistics = token_logps(
            hidden.gather(1, index),
            self.llama.head_weight,
            batch.labels,
            shard=self._shard,
            wanted=wanted,
        )
        return TokenLogps(logps, statistics)

    def padded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and segments; under sequence parallel of a length that the ranks divide."""
        extra = -batch.input_ids.shape[1] % self._parallel.tensor if self._parallel.sequence_parallel else 0
        parts = ((batch.input_ids, 0), (batch.position_ids, 0), (batch.segment_ids, PADDING_SEGMENT))
        ids, positions, segments = (F.pad(part, (0, extra), value=value) for part, value in parts)
        return ids, positions, segments


class Runner:
    """A Runner of the engines' steps: one micro-batch, and one graph, after the other."""

    def __init__(self, scorer: Scorer, platform: Platform) -> None:
        self._scorer = scorer
        self._platform = platform

    @torch.no_grad()
    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        results = []
        for batch in micro_batches:
            results.append(self._scorer(batch, wanted))
            self._platform.mark_step()
        return results

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        results = []
        for index, batch in enumerate(micro_batches):
            result = self._scorer(batch, wanted)
            share(index, result).backward()  # type: ignore[no-untyped-call]
            results.append(result.detach())
            self._platform.mark_step()
        return results
