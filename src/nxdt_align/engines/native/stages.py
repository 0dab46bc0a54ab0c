"""Cutting a decoder into the stages of a pipeline: which layers each holds, and what is left of the model.

Stage ``s`` of a pipeline over ``p`` ranks is on rank ``s % p``: with several stages per rank (virtual
pipeline), each rank holds chunks that lie ``p`` stages apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import nn

from nxdt_align.engines.base import EngineError
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.partition import even_stages
from nxdt_align.models.presets import DecoderConfig


@dataclass(frozen=True)
class Stage:
    """One of ``count`` stages, in the order in which a micro-batch goes through them."""

    index: int
    count: int
    layers: range
    """Numbers of its decoder layers in the whole model."""

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def stages_of_rank(
    config: DecoderConfig, rank: int, ranks: int, *, chunks: int = 1, cuts: Sequence[int] | None = None
) -> list[Stage]:
    """The stages that a pipeline rank holds, in order.

    Args:
        config: the whole model's.
        rank: its place among the ``ranks`` of the pipeline.
        chunks: stages per rank.
        cuts: layers after which the model is cut, ascending; None for even shares.

    Raises EngineError where the model cannot be cut so.
    """
    count = ranks * chunks
    shares = layers_of_stages(config.num_hidden_layers, count, cuts)
    return [Stage(index, count, shares[index]) for index in range(rank, count, ranks)]


def layers_of_stages(layers: int, stages: int, cuts: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage: those up to each cut, or ``even_stages``.

    Raises EngineError for more stages than layers, or cuts that leave a stage without a layer.
    """
    if not 1 <= stages <= layers:
        raise EngineError(
            "distributed_strategy.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size: must "
            f"be 1 to the number of layers ({layers}), but is {stages}"
        )
    if cuts is None:
        ends = list(accumulate(even_stages(layers, stages)))
    else:
        ends = [*(cut + 1 for cut in cuts), layers]
    shares = [range(start, end) for start, end in pairwise([0, *ends])]
    if len(shares) != stages or not all(shares):
        raise EngineError(
            f"model.pipeline_cuts: must name {stages - 1} layers below the last ({layers - 1}) in ascending "
            f"order, but names {list(cuts or ())}"
        )
    return shares


def prune(decoder: Decoder, stage: Stage) -> None:
    """Leave of ``decoder`` what ``stage`` holds; every weight keeps its name in the whole model.

    An embedding that is the head too is in the first and in the last stage.
    """
    model = decoder.model
    assert isinstance(model.layers, nn.ModuleList), "this model has been cut already"
    model.layers = nn.ModuleDict({str(i): model.layers[i] for i in stage.layers})
    if not stage.is_first:
        model.takes_hidden_states = True
        if not (stage.is_last and decoder.config.tie_word_embeddings):
            model.embed_tokens = None
    if not stage.is_last:
        model.norm = None
        decoder.lm_head = None
