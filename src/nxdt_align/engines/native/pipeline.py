"""Pipeline parallel: micro-batches through stages on several ranks (``torch.distributed.pipelining``).

Legend: ``B`` rows, ``S`` tokens, ``D`` hidden, ``T`` response positions of a micro-batch; ``n``
micro-batches of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.nn.functional import pad

from nxdt_align.batch import Batch, TokenStatistic
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.mesh import Group
from nxdt_align.engines.native.stages import Stage
from nxdt_align.engines.scoring import Scorer, refuse_logits
from nxdt_align.engines.steps import Share, TokenLogps
from nxdt_align.models.decoder import Decoder
from nxdt_align.ops.ragged import ModelInputs

LEAST_TORCH = (2, 13)


def require_torch(version: str = torch.__version__) -> None:
    """Raise EngineError where pipeline parallel is known to go wrong."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < LEAST_TORCH:
        raise EngineError(
            "distributed_strategy.pipeline_model_parallel_size: above 1 needs torch 2.13 or newer on engine "
            f"native, but torch is {version}, whose pipelines crash on gloo and give wrong gradients under "
            "tensor parallel; install torch 2.13, or set distributed_strategy.pipeline_model_parallel_size=1"
        )


@dataclass(frozen=True)
class HiddenStates:
    """What travels between stages, in ``dtype``: (B, S / ``shards``, ``size``), S rounded up."""

    size: int
    dtype: torch.dtype = torch.float32
    shards: int = 1
    """Ranks that share a row's tokens there (sequence parallel)."""
    ragged: bool = False
    """All rows' tokens travel as one row, whose end is empty: (1, B * S / shards, size)."""

    def shape(self, rows: int, tokens: int) -> tuple[int, int, int]:
        places = -(-tokens // self.shards)
        return (1, rows * places, self.size) if self.ragged else (rows, places, self.size)


def check_count(micro_batches: int, ranks: int, chunks: int) -> None:
    """Raise EngineError for a number of micro-batches that the schedule of a training step does not take."""
    if chunks == 1 and micro_batches < ranks:
        raise EngineError(
            f"a training step through a pipeline of {ranks} ranks needs at least {ranks} micro-batches, but "
            f"has {micro_batches}; plan its rows with min_micro_batches={ranks}, which adds empty ones"
        )
    rounds = max(1, micro_batches // ranks)
    if chunks > 1 and micro_batches % rounds:
        raise EngineError(
            f"a training step through an interleaved pipeline of {ranks} ranks needs rounds of one size, of "
            f"at least {ranks} micro-batches, but {micro_batches} are no multiple of {rounds} rounds; plan "
            f"its rows with round_size={ranks}, which adds empty ones"
        )


class StageScorer(nn.Module):
    """One stage of a Scorer: token ids or hidden states in, hidden states or log-probabilities out.

    Args:
        scorer: over what ``stage`` holds of the decoder.
        hidden: what travels between stages.
    """

    def __init__(self, scorer: Scorer, stage: Stage, hidden: HiddenStates) -> None:
        super().__init__()
        self.scorer = scorer
        self.stage = stage
        self.hidden = hidden

    @property
    def decoder(self) -> Decoder:
        decoder = self.scorer.decoder
        assert isinstance(decoder, Decoder)
        return decoder

    def forward(
        self, received: Tensor | None = None, *, wanted: Sequence[TokenStatistic], **inputs: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """One micro-batch.

        Args:
            received: the earlier stage's hidden states, (B, S, D); None in the first stage.
            inputs: the fields of ModelInputs. Every stage has them: positions and attention come from them.

        Returns (B, S, D); in the last stage (B, T) log-probabilities, and what else is wanted.
        """
        batch = ModelInputs(**inputs)
        rows = self.scorer.rows(batch)
        if received is not None:
            received = received[:, : self.hidden.shape(*rows.input_ids.shape)[1]]
        hidden = self.scorer.run(rows, received)
        if not self.stage.is_last:
            missing = self.hidden.shape(*batch.input_ids.shape)[1] - hidden.shape[1]
            return pad(hidden, (0, 0, 0, missing)) if missing else hidden
        logps, statistics, *_ = self.scorer.read(hidden, rows, wanted)
        # Not a view: FSDP and the schedule hook onto outputs, and the latter detaches them in place.
        return logps.clone(), *(statistic.clone() for statistic in statistics)


@dataclass(frozen=True)
class _Shape:
    """What a schedule is made for."""

    training: bool
    micro_batches: int
    rows: int
    tokens: int
    responses: int
    outputs: int
    """Tensors that the last stage gives a micro-batch: log-probs, and what is read beside them."""


@dataclass(frozen=True)
class _Made:
    shape: _Shape
    schedule: Any
    stages: Sequence[PipelineStage]


class PipelineRunner:
    """A Runner for a model that is cut into stages. All ranks of ``group`` make the same calls.

    1F1B, or interleaved 1F1B where a rank holds several stages. Forward and backward need at least as
    many micro-batches as there are ranks, and interleaved rounds of equal size (see the row plan);
    a forward pass alone takes any number.

    Args:
        stages: this rank's, in order.
        group: the ranks of the pipeline, the first stage's first.
        device: where the stages are.
    """

    def __init__(self, stages: Sequence[StageScorer], group: Group, device: torch.device) -> None:
        self._stages = stages
        self._group = group
        self._device = device
        self._latest: dict[bool, _Made] = {}
        self._share: Share | None = None

    @torch.no_grad()
    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        return self._run(micro_batches, wanted, training=False)

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        self._share = share
        try:
            return self._run(micro_batches, wanted, training=True)
        finally:
            self._share = None

    def _run(
        self, micro_batches: Sequence[Batch], wanted: Sequence[TokenStatistic], *, training: bool
    ) -> list[TokenLogps]:
        refuse_logits(wanted)
        inputs = _joined(micro_batches)
        count = len(micro_batches)
        rows, tokens = micro_batches[0].input_ids.shape
        responses = micro_batches[0].labels.shape[1]
        outputs = 1 + len(wanted)
        made = self._schedule(_Shape(training, count, rows, tokens, responses, outputs))
        # The number of each micro-batch, on the host: all that the loss needs to know as its target.
        target = torch.arange(count) if training else None
        try:
            found = made.schedule.step(target=target, wanted=wanted, **inputs._asdict())
        except RuntimeError as error:
            self._latest.clear()
            # A stage's error says what tensors went in; its cause says what went wrong.
            raise error.__cause__ or error from None
        for stage in made.stages:
            stage.clear_runtime_states()
        results = self._told(found, (outputs, count * rows, responses))
        parts = zip(*(result.split(rows) for result in results), strict=True)
        return [TokenLogps(logps, tuple(statistics)) for logps, *statistics in parts]

    def _told(self, found: Any, shape: tuple[int, ...]) -> Tensor:
        """The last stage's results on every rank, (outputs, n * B, T)."""
        if self._stages[-1].stage.is_last:
            values = torch.stack([part.detach() for part in found])
        else:
            values = torch.empty(shape, dtype=torch.float32, device=self._device)
        self._group.broadcast(values, self._group.size - 1)
        return values

    def _loss(self, output: tuple[Tensor, ...], index: Tensor) -> Tensor:
        assert self._share is not None
        logps, *statistics = output
        return self._share(int(index), TokenLogps(logps, tuple(statistics)))

    def _schedule(self, shape: _Shape) -> _Made:
        """The last one of its kind where that has the same shape: a schedule keeps the shapes that it was
        made for, and receive buffers for n micro-batches, so no more than two are kept."""
        made = self._latest.pop(shape.training, None)
        if made is None or made.shape != shape:
            made = None  # its buffers go before those of the next
            made = self._made(shape)
        self._latest[shape.training] = made
        return made

    def _made(self, shape: _Shape) -> _Made:
        count = shape.micro_batches
        if shape.training:
            check_count(count, self._group.size, len(self._stages))
        stages: list[Any] = [self._pipeline_stage(stage, shape) for stage in self._stages]
        is_single = len(stages) == 1
        schedule: Any
        if not shape.training:
            schedule = ScheduleGPipe(stages[0], count) if is_single else ScheduleLoopedBFS(stages, count)
        # Shares of the loss add up, so gradients are not divided by their number.
        elif is_single:
            schedule = Schedule1F1B(stages[0], count, self._loss, scale_grads=False)
        else:
            schedule = ScheduleInterleaved1F1B(stages, count, self._loss, scale_grads=False)
        return _Made(shape, schedule, stages)

    def _pipeline_stage(self, scorer: StageScorer, shape: _Shape) -> PipelineStage:
        """Shapes are given, so that no micro-batch is spent on finding them out."""
        travelling = torch.empty(
            scorer.hidden.shape(shape.rows, shape.tokens),
            dtype=scorer.hidden.dtype,
            device="meta",
            requires_grad=shape.training,
        )
        result = torch.empty((shape.rows, shape.responses), device="meta", requires_grad=shape.training)
        stage = scorer.stage
        return PipelineStage(
            scorer,
            stage.index,
            stage.count,
            self._device,
            input_args=() if stage.is_first else (travelling,),
            output_args=(result,) * shape.outputs if stage.is_last else (travelling,),
            group=self._group.group,
        )


def _joined(micro_batches: Sequence[Batch]) -> ModelInputs:
    """The rows of all micro-batches: a schedule cuts them apart again."""
    each = [ModelInputs.of(batch) for batch in micro_batches]
    shapes = {tuple(tuple(part.shape) for part in inputs) for inputs in each}
    if len(shapes) != 1:
        raise ValueError(f"the micro-batches of a step must have one shape, but have {sorted(shapes)}")
    return ModelInputs(*(torch.cat(parts) for parts in zip(*each, strict=True)))
