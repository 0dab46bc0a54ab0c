"""Cutting a Llama: every weight in one stage under its own name, and cuts that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import TINY, draw_weights, plain_model

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.pipeline import check_count, require_torch
from nxdt_align.engines.native.stages import Stage, layers_of_stages, prune, stages_of_rank
from nxdt_align.models.decoder import Decoder, DecoderLayer
from nxdt_align.models.partition import even_cuts
from nxdt_align.ops.attention import DenseAttention

DEEP = replace(TINY, num_hidden_layers=5)
TIED = replace(DEEP, tie_word_embeddings=True)


def on_meta() -> Decoder:
    with torch.device("meta"):
        return Decoder(DEEP, DenseAttention())


def test_every_weight_is_in_one_stage_under_its_own_name() -> None:
    wanted = {name: tuple(p.shape) for name, p in on_meta().named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    for rank in range(2):
        for stage in stages_of_rank(DEEP, rank, 2, chunks=2):
            decoder = on_meta()
            prune(decoder, stage)
            here = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
            assert here and not set(here) & set(found)
            found |= here
            assert ("model.embed_tokens.weight" in here) == stage.is_first
            assert ("lm_head.weight" in here) == ("model.norm.weight" in here) == stage.is_last
    assert found == wanted


def test_stages_go_round_the_ranks() -> None:
    """5 layers in 4 stages, the last with 2: rank 0 has stages 0 and 2, rank 1 has 1 and 3."""
    stages = [stages_of_rank(DEEP, rank, 2, chunks=2) for rank in range(2)]
    assert [[(s.index, list(s.layers)) for s in rank] for rank in stages] == [
        [(0, [0]), (2, [2])],
        [(1, [1]), (3, [3, 4])],
    ]


@pytest.mark.parametrize(("layers", "stages"), [(4, 2), (5, 2), (5, 4), (32, 6), (7, 7)])
def test_even_shares_are_those_of_nxd(layers: int, stages: int) -> None:
    shares = layers_of_stages(layers, stages)
    assert [n for share in shares for n in share] == list(range(layers))
    assert tuple(share[-1] for share in shares[:-1]) == even_cuts(layers, stages)


def test_cuts_are_after_the_layers_named() -> None:
    assert layers_of_stages(8, 3, [0, 5]) == [range(1), range(1, 6), range(6, 8)]


@pytest.mark.parametrize("cuts", [[0], [0, 0], [5, 2], [1, 7], [1, 9]])
def test_cuts_that_leave_a_stage_empty(cuts: list[int]) -> None:
    with pytest.raises(EngineError, match=r"model.pipeline_cuts: must name 2 layers below the last \(7\)"):
        layers_of_stages(8, 3, cuts)


def test_more_stages_than_layers() -> None:
    with pytest.raises(EngineError, match=r"must be 1 to the number of layers \(5\), but is 6"):
        stages_of_rank(DEEP, 0, 3, chunks=2)


def test_a_tied_embedding_is_in_the_first_and_the_last_stage() -> None:
    """In the last one as the head alone: hidden states go in."""
    holders = []
    for rank in range(2):
        for stage in stages_of_rank(TIED, rank, 2, chunks=2):
            decoder = Decoder(TIED, DenseAttention())
            prune(decoder, stage)
            assert decoder.lm_head is None and (decoder.model.norm is not None) == stage.is_last
            if any("embed" in name for name, _ in decoder.named_parameters()):
                holders.append(stage.index)
                ids = torch.zeros(1, 3, dtype=torch.int64)
                x = ids if stage.is_first else torch.randn(1, 3, TIED.hidden_size)
                assert decoder(x, ids, None).shape == (1, 3, TIED.hidden_size)
    assert sorted(holders) == [0, 3]


def test_a_stage_draws_the_whole_models_fresh_weights() -> None:
    whole, stage = Decoder(DEEP, DenseAttention()), Decoder(DEEP, DenseAttention())
    draw_weights(whole, 3)
    prune(stage, Stage(1, 2, range(2, 5)))
    draw_weights(stage, 3)
    values = dict(whole.named_parameters())
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, values[name]), name


def test_stages_one_after_the_other_are_the_model_with_checkpointing_too() -> None:
    whole = plain_model()
    ids = torch.arange(12).view(1, 12)
    hidden = whole(ids, ids, None)
    x = ids
    for index, layers in enumerate((range(1), range(1, 2))):
        part = plain_model()
        prune(part, Stage(index, 2, layers))
        part.set_checkpointing("full")
        (layer,) = part.model.layers.children()
        assert isinstance(layer, DecoderLayer) and layer.recompute is not None
        x = part(x, ids, None)
    assert torch.equal(x, hidden)


@pytest.mark.parametrize("version", ["2.9.1", "2.12.0+cu130"])
def test_a_torch_whose_pipelines_go_wrong(version: str) -> None:
    with pytest.raises(
        EngineError, match=r"pipeline_model_parallel_size: above 1 needs torch 2.13 .* is 2\."
    ):
        require_torch(version)


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.14.0a0+git12", "3.0.0"])
def test_a_torch_that_is_new_enough(version: str) -> None:
    require_torch(version)


@pytest.mark.parametrize(
    ("count", "chunks", "rule"),
    [
        (3, 1, r"pipeline of 4 ranks needs at least 4 micro-batches, but has 3; .* min_micro_batches=4"),
        (9, 2, r"at least 4 micro-batches, but 9 are no multiple of 2 rounds; .* round_size=4"),
    ],
)
def test_micro_batches_that_a_schedule_does_not_take(count: int, chunks: int, rule: str) -> None:
    with pytest.raises(EngineError, match=rule):
        check_count(count, 4, chunks)


@pytest.mark.parametrize(("count", "chunks"), [(4, 1), (9, 1), (1, 2), (3, 2), (10, 2), (12, 2)])
def test_micro_batches_that_a_schedule_takes(count: int, chunks: int) -> None:
    check_count(count, 4, chunks)
