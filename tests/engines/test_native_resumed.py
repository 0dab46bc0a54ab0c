"""A model that is spread otherwise after each step, by way of a checkpoint, trains as one that is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matrix import but_for
from parallel_fixture import (
    CLIP,
    LOSSES,
    SHAPE,
    STEPS,
    Case,
    adamw,
    make_model,
    oracle,
    oracle_loss,
    run_parallel,
    worst,
)
from torch import Tensor

from nxdt_align.engines.native.checkpoint import NativeCheckpoint
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.presets import DecoderConfig

Turns = tuple[list[float], list[dict[str, Tensor]]]
"""Of one rank: each step's loss, and the whole weights after it (rank 0 alone)."""
LAYOUTS = (
    Case(tensor=2, pipeline=2, sequence_parallel=True),
    Case(data=4, zero1=True),
    Case(pipeline=2, virtual_pipeline=2, data=2, min_micro_batches=2),
    Case(tensor=2, data=2, fsdp=True),
    Case(tensor=4, sequence_parallel=True),
)
"""tensor 4 is above the two kv heads."""


SHAPES = {"": SHAPE, "tied head": replace(SHAPE, tie_word_embeddings=True)}


def take_turns(rank: int, world: int, folder: Path, shape: DecoderConfig) -> Turns:
    """For ``run_parallel``: one step in each layout."""
    losses, weights = [], []
    before: Path | None = None
    for step, layout in enumerate(LAYOUTS, 1):
        case = replace(layout, shape=shape)
        engine = case.engine(rank)
        optimizer = adamw([p for _, p in engine.named_parameters()])
        if before is not None:
            assert engine.load(before, optimizer) == {"global_step": step - 1}
        batches = case.micro_batches(rank, case.examples())
        losses.append(float(engine.step(batches, GlobalMeanObjective(LOSSES["dpo"])).loss))
        engine.clip_gradients(CLIP)
        optimizer.step()
        before = folder / f"step={step}"
        engine.save(before, optimizer, {"global_step": step}, background=step % 2 == 0)
        engine.finish_saving()
        weights.append(dict(engine.whole_parameters()))
    return losses, weights


@pytest.fixture(scope="module", params=but_for(["tied head"], SHAPES))
def spread(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DecoderConfig, Path, list[Turns]]:
    folder, shape = tmp_path_factory.mktemp("turns"), SHAPES[request.param]
    return shape, folder, run_parallel(4, take_turns, folder, shape)


def test_every_step_is_that_of_one_process(spread: tuple[DecoderConfig, Path, list[Turns]]) -> None:
    """Loss within 1e-6, weights within 1e-5 after each AdamW step with clipping."""
    assert len(LAYOUTS) == STEPS
    shape, _, ranks = spread
    case, model, reference = Case(shape=shape), make_model(0, shape), make_model(1, shape)
    for losses, _ in ranks:
        assert losses == ranks[0][0], "every rank says the same"
    for steps, gathered in enumerate(ranks[0][1], 1):
        assert worst(gathered, oracle(replace(case, steps=steps)).weights, relative=False)[0] <= 1e-5
        with torch.no_grad():
            loss = float(oracle_loss("dpo", model, reference, case.examples().examples))
        assert abs(ranks[0][0][steps - 1] - loss) <= 1e-6
        model.load_state_dict(oracle(replace(case, steps=steps)).weights)


def test_the_checkpoints_hold_what_the_ranks_held(spread: tuple[DecoderConfig, Path, list[Turns]]) -> None:
    _, folder, ranks = spread
    for step, gathered in enumerate(ranks[0][1], 1):
        source = NativeCheckpoint(folder / f"step={step}")
        assert sorted(source.names()) == sorted(gathered)
        assert all(source.read(name).equal(tensor) for name, tensor in gathered.items())
    assert all(weights == {} for _, others in ranks[1:] for weights in others)
