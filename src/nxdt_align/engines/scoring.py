"""A micro-batch in, its response tokens' log-probabilities out: what a rank does with a decoder whose layers
are all there, or with the part of it that it holds.

Legend: ``B`` rows, ``S`` tokens, ``D`` hidden, ``T`` response positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nxdt_align.batch import INT32_DEVICES, Batch, TokenStatistic
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.ranks import Group
from nxdt_align.engines.settings import Parallel
from nxdt_align.engines.steps import RouterLoss, Share, TokenLogps
from nxdt_align.models.decoder import CausalModel, Decoder
from nxdt_align.ops.attention import Attention, pad_bounds
from nxdt_align.ops.logprobs import VocabShard, token_logps
from nxdt_align.ops.ragged import ModelInputs, PaddedRows, RaggedRow, Rows


class Scorer(nn.Module):
    """A decoder that is asked for log-probabilities alone, so that no caller ever sees its logits.

    Every tensor-parallel rank gets the whole result.

    Args:
        decoder: its modules, or an engine's in their place; also a part of its layers.
        attention: how the rows are attended over. Static shapes where it has them.
        parallel: how the model is spread.
        tensor: the ranks that hold the other rows of the head.
        compact: see ``token_logps``.
    """

    def __init__(
        self,
        decoder: CausalModel,
        attention: Attention,
        parallel: Parallel,
        tensor: Group,
        *,
        compact: bool = False,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.attention = attention
        self._row_multiple = parallel.row_multiple
        self._tensor = tensor
        self._compact = compact

    def forward(self, batch: Batch, wanted: Sequence[TokenStatistic]) -> TokenLogps:
        rows = self.rows(ModelInputs.of(batch))
        result = self.read(self.run(rows), rows, wanted)
        weight = self.decoder.router_weight
        if not weight or not torch.is_grad_enabled():
            return result
        balance = self.decoder.router_loss(rows.at_tokens(batch.responses_of_tokens()))
        value = balance * batch.share_of_examples()
        return result._replace(router=RouterLoss(value * weight, value.detach()))

    @contextmanager
    def attending(self, attention: Attention) -> Iterator[None]:
        """Meanwhile the rows are attended over by ``attention``, in a decoder that this one built with its
        own."""
        own = self.attention
        try:
            self.attention = attention
            self.decoder.set_attention(attention)
            yield
        finally:
            self.attention = own
            self.decoder.set_attention(own)

    def rows(self, inputs: ModelInputs) -> Rows:
        """The tokens that the layers run over: without padding where shapes may follow the data."""
        return PaddedRows(inputs) if self.attention.static_shapes else RaggedRow.of(inputs)

    def padded(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, positions and bounds, of a length that the ranks of sequence parallel divide."""
        missing = -rows.input_ids.shape[1] % self._row_multiple
        if not missing:
            return rows.input_ids, rows.position_ids, rows.key_start, rows.key_stop
        ids, positions = (pad(x, (0, missing)) for x in (rows.input_ids, rows.position_ids))
        return ids, positions, *pad_bounds(rows.key_start, rows.key_stop, missing)

    def context(self, key_start: Tensor, key_stop: Tensor) -> Any:
        """What the layers are told of rows with these bounds, (B, S) each."""
        return self.decoder.prepare(key_start, key_stop, self.attention.prepare)

    def run(self, rows: Rows, received: Tensor | None = None) -> Tensor:
        """The layers that are here, over the rows' token ids or over an earlier part's hidden states.

        Returns (B, S, D); a stage's layers alone give this rank's (B, S / tp, D) under sequence parallel,
        which rows are padded for.
        """
        input_ids, position_ids, *bounds = self.padded(rows)
        context = self.context(*bounds)
        hidden: Tensor = self.decoder(input_ids if received is None else received, position_ids, context)
        return hidden

    @property
    def head(self) -> Tensor:
        """This rank's rows of it."""
        return self.decoder.head_weight

    @property
    def head_bias(self) -> Tensor | None:
        """This rank's entries of it."""
        return self.decoder.head_bias

    def _first_token(self, labels: Tensor) -> int | Tensor:
        """Of this rank's rows of the head."""
        return on_device(self._tensor.rank * self.head.shape[0], labels)

    def read(self, hidden: Tensor, rows: Rows, wanted: Sequence[TokenStatistic]) -> TokenLogps:
        """The head, over what ``run`` gives where the last layer and the norm are: (B, S, D).

        Raises EngineError for logits where this rank has a part of the vocabulary's alone.
        """
        return self.finish(hidden, rows, self._first_token(rows.labels), tuple(wanted))

    def finish(
        self, hidden: Tensor, rows: Rows, first: int | Tensor, wanted: Sequence[TokenStatistic]
    ) -> TokenLogps:
        """``read``, with what must not be a part of a graph handed in: ``first``, see VocabShard."""
        at_responses, head, tensor = rows.at_responses(hidden), self.head, self._tensor
        bias, form = self.head_bias, self.decoder.head_form
        logits = None
        if "logits" in wanted:
            if tensor.size > 1:
                raise EngineError("each tensor-parallel rank has a part of the vocabulary's logits alone")
            whole = (at_responses @ head.T.to(at_responses.dtype)).float()
            logits = rows.spread(form.applied(whole if bias is None else whole + bias.float()))
        logps, statistics = token_logps(
            at_responses,
            head,
            rows.labels,
            shard=VocabShard(first, tensor.largest, tensor.summed),
            compact=self._compact,
            wanted=[name for name in wanted if name != "logits"],
            bias=bias,
            scale=form.scale,
            softcap=form.softcap,
        )
        return TokenLogps(rows.spread(logps), tuple(rows.spread(each) for each in statistics), logits)


class DecoderScorer(Scorer):
    """Of our own decoder, whose parts an engine may go through by itself."""

    decoder: Decoder


def on_device(number: int, like: Tensor) -> int | Tensor:
    """A rank's own number, which its graph must not be made of: (1,) in ``like``'s dtype where that is on a
    device of compiled graphs."""
    if like.device.type not in INT32_DEVICES:
        return number
    return torch.tensor([number], dtype=like.dtype).to(like.device)


class WholeRunner:
    """A Runner for a model whose layers are all here: one micro-batch after the other.

    Args:
        end_micro_batch: called after each.
    """

    def __init__(self, scorer: Scorer, end_micro_batch: Callable[[], None] = lambda: None) -> None:
        self._scorer = scorer
        self._end_micro_batch = end_micro_batch

    @torch.no_grad()
    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        results = []
        for batch in micro_batches:
            results.append(self._scorer(batch, wanted))
            self._end_micro_batch()
        return results

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        results = []
        for index, batch in enumerate(micro_batches):
            result = self._scorer(batch, wanted)
            share(index, result).backward()  # type: ignore[no-untyped-call]
            results.append(result.detach())
            self._end_micro_batch()
        return results


def refuse_logits(wanted: Sequence[TokenStatistic]) -> None:
    """Raise EngineError where a pipeline is asked for logits."""
    if "logits" in wanted:
        raise EngineError(
            "logits stay in a pipeline's last stage, but every stage computes the loss's metrics"
        )
