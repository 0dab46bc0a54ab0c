"""A decoder cut into the stages of a pipeline by NxD's NxDPPModel, with the loss inside the model.

NxD traces the model with torch.fx, cuts the trace after the decoder layers that it is told, and runs
1F1B. It keeps the shapes and the number of micro-batches that it met first, so each has a model of its own
here, over the same weights.

Legend: ``B`` rows, ``S`` tokens, ``D`` hidden, ``M`` micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from neuronx_distributed.pipeline import NxDPPModel
from torch import Tensor, nn

from nxdt_align.batch import Batch, TokenStatistic
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.nxd.compat import Platform
from nxdt_align.engines.nxd.settings import Parallel
from nxdt_align.engines.ranks import Groups
from nxdt_align.engines.scoring import DecoderScorer, refuse_logits
from nxdt_align.engines.steps import Share, TokenLogps
from nxdt_align.models.decoder import DecoderLayer
from nxdt_align.ops.ragged import ModelInputs

INPUTS = ("input_ids", "position_ids", "key_start", "key_stop")


@dataclass
class Turn:
    """One run's micro-batches, as the last stage meets them."""

    model: NxDPPModel
    micro_batches: Sequence[Batch]
    wanted: Sequence[TokenStatistic]
    share: Share | None
    """None where nothing is trained."""
    results: list[TokenLogps] = field(default_factory=list)


class Places(nn.Module):
    """What every layer of a stage is told of its tokens; each stage works it out, so that it is not sent."""

    def __init__(self, scorer: DecoderScorer) -> None:
        super().__init__()
        self.rotary_emb = scorer.decoder.model.rotary_emb
        self._context = scorer.context

    def forward(self, position_ids: Tensor, key_start: Tensor, key_stop: Tensor) -> tuple[Any, Any]:
        return self.rotary_emb(position_ids), self._context(key_start, key_stop)


class Reader(nn.Module):
    """The head and the loss of the last stage: (B, S, D) -> what NxD calls the loss, () float32."""

    turn: Turn | None = None

    def __init__(self, scorer: DecoderScorer) -> None:
        super().__init__()
        # NxD trains what it finds in a stage's modules.
        self.lm_head = scorer.decoder.lm_head
        self._rows, self._read = scorer.rows, scorer.read

    def forward(self, hidden: Tensor) -> Tensor:
        turn = self.turn
        assert turn is not None
        nothing = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if turn.model.tracing:
            return nothing  # NxD only asks for the shapes between stages
        index = len(turn.results)
        rows = self._rows(ModelInputs.of(turn.micro_batches[index]))
        result = self._read(hidden, rows, turn.wanted)
        turn.results.append(result.detach())
        if turn.share is None:
            return nothing
        # NxD takes the mean over the micro-batches; shares add up.
        return turn.share(index, result) * len(turn.micro_batches)


class StagedScorer(nn.Module):
    """A Scorer in the form in which NxD can trace and cut it: a row of modules that it does not look into."""

    def __init__(self, scorer: DecoderScorer, stage_ends: Sequence[int]) -> None:
        super().__init__()
        self.decoder = scorer.decoder
        self.places = Places(scorer)
        self.reader = Reader(scorer)
        self._ends = frozenset(stage_ends)

    def forward(self, input_ids: Tensor, position_ids: Tensor, key_start: Tensor, key_stop: Tensor) -> Tensor:
        body = self.decoder.model
        assert body.embed_tokens is not None and body.norm is not None
        x = body.scaled_embedding(body.embed_tokens(input_ids))
        where = self.places(position_ids, key_start, key_stop)
        for number, layer in enumerate(body.layers.children()):
            x = layer(x, body.rotary_of(layer, where[0]), body.context_of(layer, where[1]))
            if number in self._ends:
                # In the trace this comes after the cut: it is the next stage's own.
                where = self.places(position_ids, key_start, key_stop)
        return self.reader(body.norm(x))  # type: ignore[no-any-return]


class PipelineRunner:
    """A Runner for a model of which each rank holds a stage.

    Args:
        scorer: over a decoder whose other stages' weights are on the meta device.
        local: this stage's weights.
        stage_ends: the numbers of the stages' last layers, but for the last stage's.
        parallel: how the model is spread.
    """

    def __init__(
        self,
        scorer: DecoderScorer,
        local: Sequence[nn.Parameter],
        stage_ends: Sequence[int],
        parallel: Parallel,
        groups: Groups,
        platform: Platform,
    ) -> None:
        self._scorer, self._groups, self._platform = scorer, groups, platform
        self._parallel = parallel
        self._staged = StagedScorer(scorer, stage_ends)
        self._cuts = [f"decoder.model.layers.{number}" for number in stage_ends]
        self._local = {id(parameter) for parameter in local}
        self._models: dict[tuple[int, ...], NxDPPModel] = {}

    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        """As the contract says."""
        return self._run(micro_batches, None, wanted)

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        """As the contract says."""
        return self._run(micro_batches, share, wanted)

    def _run(
        self, micro_batches: Sequence[Batch], share: Share | None, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        refuse_logits(wanted)
        inputs = self._inputs(micro_batches)
        rows, tokens = inputs["input_ids"].shape
        model = self._model(len(micro_batches), rows, tokens)
        turn = self._staged.reader.turn = Turn(model, micro_batches, wanted, share)
        # With grad mode as NxD sets it: its shapes come with which tensors want gradients.
        (model.run_eval if share is None else model.run_train)(**inputs)
        self._staged.reader.turn = None
        return self._tell(turn)

    def _inputs(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """(M * B, S) int64 each, on the CPU, from where NxD brings each micro-batch to the device."""
        shapes = {tuple(batch.input_ids.shape) for batch in micro_batches}
        if len(shapes) != 1:
            raise EngineError(
                f"a pipeline takes micro-batches of one shape at a time, but got {sorted(shapes)}"
            )
        each = [ModelInputs.of(batch.map(_to_cpu)) for batch in micro_batches]
        parts = [self._scorer.padded(self._scorer.rows(inputs)) for inputs in each]
        columns = zip(*parts, strict=True)
        return {name: torch.cat(column) for name, column in zip(INPUTS, columns, strict=True)}

    def _model(self, count: int, rows: int, tokens: int) -> NxDPPModel:
        key = (count, rows, tokens)
        if key not in self._models:
            self._models[key] = self._cut(count)
            if self._platform.alone:
                self._say_what_comes(self._models[key], rows // count, tokens)
        return self._models[key]

    def _say_what_comes(self, model: NxDPPModel, rows: int, tokens: int) -> None:
        """What the stage before tells of the hidden states that it will send, where it is not there."""
        scattered = self._parallel.sequence_parallel
        shape = (tokens // self._parallel.tensor, rows) if scattered else (rows, tokens)
        trained = [parameter for parameter in model.local_parameters() if parameter.requires_grad]
        head = self._scorer.head
        hidden = torch.empty(
            (*shape, head.shape[1]), dtype=head.dtype, device="meta", requires_grad=bool(trained)
        )
        form, _, metadata = model.serialization_manager.serialize(hidden)
        for received in model.stage_id_to_IO_input_names[self._groups.pipeline.rank].values():
            received.obj, received.metadata = form, metadata
        model.shape_traced, model.tracing = True, False

    def _cut(self, count: int) -> NxDPPModel:
        body = self._scorer.decoder.model
        opaque = (body.norm, body.scaled_embedding, self._staged.places, self._staged.reader)
        leaves = {type(module).__name__ for module in opaque}
        model = NxDPPModel(
            self._staged,
            transformer_layer_cls=DecoderLayer,
            num_microbatches=count,
            output_loss_value_spec=True,
            input_names=list(INPUTS),
            pipeline_cuts=self._cuts,
            leaf_module_cls=sorted(leaves),
            tracer_cls="torch",
            # The weights are on the device, and gradients are summed over data-parallel ranks, by the engine.
            use_model_wrapper=True,
            use_optimizer_wrapper=True,
            # Nothing waits for the device: ``Turn`` has the results.
            return_loss_on_cpu=False,
        )
        if {id(parameter) for parameter in model.local_parameters()} != self._local:
            raise EngineError(
                "neuronx-distributed cuts the model at other layers than this version of nxdt-align knows of"
            )
        return model

    def _tell(self, turn: Turn) -> list[TokenLogps]:
        """The last stage's results on every stage, in one reduction."""
        batch, stage = turn.micro_batches[0], self._groups.pipeline
        shape = (1 + len(turn.wanted), len(turn.micro_batches), *batch.labels.shape)
        values = torch.zeros(shape, dtype=torch.float32, device=batch.labels.device)
        if stage.rank == stage.size - 1:
            columns = zip(*((logps, *statistics) for logps, statistics, *_ in turn.results), strict=True)
            values = torch.stack([torch.stack(column) for column in columns])
        stage.sum([values])
        self._platform.mark_step()
        return [TokenLogps(logps, tuple(statistics)) for logps, *statistics in zip(*values, strict=True)]


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.cpu()
