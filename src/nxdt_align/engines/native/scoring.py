"""A Scorer and its Runner on DTensors and FSDP's modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nxdt_align.batch import Batch, TokenStatistic
from nxdt_align.engines.native.gradients import local
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.parallelize import reduce_gradients, whole_rows
from nxdt_align.engines.native.settings import Precision
from nxdt_align.engines.scoring import Scorer, WholeRunner
from nxdt_align.engines.steps import Share, TokenLogps
from nxdt_align.models.decoder import CausalModel, Decoder
from nxdt_align.ops.attention import Attention
from nxdt_align.ops.ragged import Rows


class NativeScorer(Scorer):
    """A Scorer whose layers run under torch.autocast where ``precision`` says so.

    ``keeps_shapes``: the head's too, which on an eager CPU follow the data.
    """

    def __init__(
        self,
        decoder: CausalModel,
        attention: Attention,
        precision: Precision,
        device: torch.device,
        groups: Groups = Groups(),  # noqa: B008 (frozen)
        *,
        keeps_shapes: bool = False,
    ) -> None:
        compact = attention.static_shapes and device.type == "cpu" and not keeps_shapes
        super().__init__(decoder, attention, groups.parallel, groups.tensor, compact=compact)
        self._precision = precision
        self._device = device
        self._groups = groups

    def forward(self, batch: Batch, wanted: Sequence[TokenStatistic]) -> TokenLogps:
        logps, statistics, logits, router = super().forward(batch, wanted)
        # FSDP hangs its backward hooks on a module's output, which must not be a view.
        return TokenLogps(logps.clone(), statistics, None if logits is None else logits.clone(), router)

    def run(self, rows: Rows, received: Tensor | None = None) -> Tensor:
        # Without the head, whose product is accumulated in float32.
        with self._precision.context(self._device):
            return super().run(rows, received)

    @property
    def head(self) -> Tensor:
        return local(self.decoder.head_weight)

    @property
    def head_bias(self) -> Tensor | None:
        bias = self.decoder.head_bias
        return None if bias is None else local(bias)

    def finish(
        self, hidden: Tensor, rows: Rows, first: int | Tensor, wanted: Sequence[TokenStatistic]
    ) -> TokenLogps:
        if isinstance(self.decoder, Decoder):
            hidden = self.decoder.model.finish(hidden)
        return super().finish(whole_rows(hidden, self._groups), rows, first, wanted)


class ReduceOnceRunner(WholeRunner):
    """For an FSDP module: its weights stay gathered until the last micro-batch's backward pass, which
    reduces the sum of all gradients."""

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        def last_reduces(index: int, result: TokenLogps) -> Tensor:
            reduce_gradients(self._scorer, now=index == len(micro_batches) - 1)
            return share(index, result)

        return super().backward(micro_batches, last_reduces, wanted=wanted)
