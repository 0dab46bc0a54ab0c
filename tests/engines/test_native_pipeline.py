"""Pipeline parallel: against the plain model, and against one process over steps of changing kinds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from matrix import asked, but_for
from oracle import assert_gradients_close
from parallel_fixture import SHAPE, Case, merged, oracle, outcomes, worst
from parallel_fixture import Outcome as Training
from pipeline_fixture import Outcome, Sequence, Step, in_one_process, over_ranks

from nxdt_align.engines.native.settings import Precision
from nxdt_align.models.presets import DecoderConfig

TOLERANCE = 1e-6
"""Of the loss and the norms, and of each gradient relative to its largest entry."""
WEIGHT_TOLERANCE = 1e-5
"""After 5 AdamW steps with active clipping."""

SPREADS = {
    "pp2": Case(pipeline=2),
    "pp2 x 2 chunks": Case(pipeline=2, virtual_pipeline=2, attention="blocks"),
    "pp4": Case(pipeline=4, min_micro_batches=4),
    "pp2 dp2": Case(pipeline=2, data=2, attention="blocks"),
    "pp2 dp2 zero1": Case(pipeline=2, data=2, zero1=True),
    "pp2 dp2 fsdp": Case(pipeline=2, data=2, fsdp=True),
    "pp2 x 2 chunks dp2 fsdp": Case(pipeline=2, virtual_pipeline=2, data=2, fsdp=True, attention="blocks"),
    "pp2 tp2 sp": Case(pipeline=2, tensor=2, sequence_parallel=True),
    "pp2 tp2": Case(pipeline=2, tensor=2, attention="blocks"),
}
TIED = replace(SHAPE, tie_word_embeddings=True)
TIED_SPREADS = {
    f"{name}, tied head": replace(SPREADS[name], shape=TIED)
    for name in (
        "pp2",
        "pp2 x 2 chunks",
        "pp4",
        "pp2 dp2 zero1",
        "pp2 x 2 chunks dp2 fsdp",
        "pp2 tp2 sp",
        "pp2 tp2",
    )
}
TRAININGS = {
    f"{name}, {loss}": replace(case, loss=loss)
    for name, case in (SPREADS | TIED_SPREADS).items()
    for loss in ("dpo", "orpo")
    if loss == "orpo" or not (case.zero1 or case.fsdp)
}


USUAL = (
    *("pp2, dpo", "pp2 dp2 zero1, orpo", "pp2 x 2 chunks dp2 fsdp, orpo", "pp2 tp2 sp, orpo"),
    *("pp4, tied head, dpo", "pp2 x 2 chunks dp2 fsdp, tied head, orpo"),
)


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> dict[str, list[Training]]:
    return outcomes(asked(request, TRAININGS))


@cache
def oracle_of(loss: str, shape: DecoderConfig) -> Training:
    return oracle(Case(loss=loss, shape=shape))


@pytest.mark.parametrize("name", but_for(USUAL, TRAININGS))
def test_as_the_plain_model(trained: dict[str, list[Training]], name: str) -> None:
    """Loss and metrics on every rank, each gradient on its stage's ranks, 5 steps of AdamW. A tied embedding
    is the same on both of its stages to the last bit."""
    ranks, want = trained[name], oracle_of(TRAININGS[name].loss, TRAININGS[name].shape)
    for got in ranks:
        assert abs(got.loss - want.loss) <= TOLERANCE
        assert abs(got.evaluated - want.loss) <= TOLERANCE
        assert got.norm == pytest.approx(want.norm, rel=TOLERANCE)
        assert got.parameter_norm == pytest.approx(want.parameter_norm, rel=TOLERANCE)
        assert got.metrics == ranks[0].metrics
    gradient = worst(merged([r.gradients for r in ranks]), want.gradients, relative=True)
    weight = worst(merged([r.weights for r in ranks]), want.weights, relative=False)
    assert gradient[0] <= TOLERANCE, gradient
    assert weight[0] <= WEIGHT_TOLERANCE, weight


CHANGING = (
    *(Step(count=9), Step("orpo", count=2, longest=60), Step(kind="validate", count=5), Step(kind="score")),
    *(Step("aot", count=9), Step("aot", kind="validate", longest=60), Step("wpo", micro=3), Step(count=9)),
)
"""Row lengths, micro-batch counts, losses with and without a pass of their own, and back to the first."""
ROWS = (
    *(Step("dpo", layout="none", count=1), Step("orpo", layout="packed", micro=3), Step("aot", count=1)),
    *(Step("wpo", count=3, layout="none"), Step("orpo", count=5, micro=2)),
)
FULL, SELECTIVE = ("full", ()), ("selective", ("CoreAttention", "LlamaMLP"))
SEQUENCES = {
    "changing": Sequence(Case(pipeline=2), CHANGING),
    "changing blocks": Sequence(Case(pipeline=2, attention="blocks"), CHANGING),
    "changing x 2 chunks blocks": Sequence(
        Case(pipeline=2, virtual_pipeline=2, attention="blocks"), CHANGING
    ),
    "empty rows": Sequence(Case(pipeline=2), ROWS),
    "empty rows x 2 chunks blocks": Sequence(Case(pipeline=2, virtual_pipeline=2, attention="blocks"), ROWS),
    "uneven cuts": Sequence(Case(pipeline=2, pipeline_cuts=(2,)), (Step(), Step("orpo"))),
    "full recompute": Sequence(Case(pipeline=2, checkpointing=FULL), (Step("wpo"), Step("aot"))),
    "selective recompute": Sequence(
        Case(pipeline=2, virtual_pipeline=2, checkpointing=SELECTIVE), (Step(), Step("orpo"))
    ),
    "bf16": Sequence(Case(pipeline=2, precision=Precision(torch.bfloat16)), (Step(), Step(kind="score"))),
    "bf16, tied head": Sequence(
        Case(pipeline=2, shape=TIED, precision=Precision(torch.bfloat16)), (Step(), Step(kind="score"))
    ),
    "autocast": Sequence(Case(pipeline=2, precision=Precision(autocast=True)), (Step(),)),
    "changing pp4 blocks": Sequence(Case(pipeline=4, attention="blocks"), (*CHANGING, *ROWS)),
    "changing tp2 sp blocks": Sequence(
        Case(pipeline=2, tensor=2, sequence_parallel=True, attention="blocks"), CHANGING
    ),
    "changing x 2 chunks dp2 fsdp": Sequence(
        Case(pipeline=2, virtual_pipeline=2, data=2, fsdp=True, checkpointing=FULL), CHANGING
    ),
}


STEPPED = (
    *("changing", "changing x 2 chunks blocks", "empty rows x 2 chunks blocks", "uneven cuts"),
    *("selective recompute", "bf16, tied head"),
)


@pytest.fixture(scope="module")
def stepped(request: pytest.FixtureRequest) -> dict[str, list[list[Outcome]]]:
    return over_ranks(asked(request, SEQUENCES))


@pytest.mark.parametrize("name", but_for(STEPPED, SEQUENCES))
def test_as_one_process_step_after_step(name: str, stepped: dict[str, list[list[Outcome]]]) -> None:
    """The same rows, one micro-batch after the other. bf16 rounds each sum anew: 2^-7 there."""
    case, ranks = SEQUENCES[name].case, stepped[name]
    is_low = case.precision.autocast or case.precision.has_masters
    # Weights are larger here, and tensor parallel ranks add parts of each sum.
    tolerance, logp_tolerance = (2**-7, 0.1) if is_low else (5e-6 if case.tensor > 1 else 2e-6, 1e-4)
    for number, want in enumerate(in_one_process(SEQUENCES[name])):
        got = [rank[number] for rank in ranks]
        for outcome in got:
            assert outcome.loss == pytest.approx(want.loss, abs=tolerance, rel=tolerance)
            assert outcome.norm == pytest.approx(want.norm, rel=tolerance)
            if not is_low:
                assert outcome.metrics == pytest.approx(want.metrics, rel=1e-4, abs=1e-4)
        if want.gradients:
            assert_gradients_close(merged([o.gradients for o in got]), want.gradients, tolerance)
        if want.logps and case.data == 1:
            for outcome in got:
                for logps, wanted in zip(outcome.logps, want.logps, strict=True):
                    assert torch.allclose(logps, wanted, atol=logp_tolerance)
