"""Models of every family on engine native: all layouts, and spread over processes, against the plain model
that is asked for one response at a time (which tests/models/test_families.py holds to transformers)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families_fixture import CONFIGS, window
from matrix import asked, but_for
from oracle import random_examples
from parallel_fixture import Case, Outcome, merged, oracle, outcomes, run_case, worst

LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 2e-5
"""Of a parameter's largest gradient."""
NORM_TOLERANCE = 5e-6
STD = 0.15
"""A spread at which scores, and with them q, k, their norms and biases, count."""
LONG = random_examples(6, 3, prompt=(1, 30), response=(1, 14))


LAYOUTS = {
    f"{name}: {layout}, {attention}": (name, layout, attention)
    for name in CONFIGS
    for layout in ("none", "packed", "shared_prompt")
    for attention in ("dense", "blocks")
}
EACH_FAMILY = [case for case in LAYOUTS if case.endswith("shared_prompt, blocks")]


@pytest.mark.parametrize(
    "case", but_for([*EACH_FAMILY, *(case for case in LAYOUTS if case.startswith("gemma3:"))], LAYOUTS)
)
def test_layouts(case: str) -> None:
    """Windows that some pairs exceed; some responses too, where a layer sees them whole."""
    name, layout, attention = LAYOUTS[case]
    shape = window(CONFIGS[name], 9 if CONFIGS[name].layer_types else 16)
    run = Case(shape=shape, std=STD, layout=layout, attention=attention, steps=1, given=LONG, data=1)  # type: ignore[arg-type]
    assert_as([run_case(0, run)], oracle(run))


SPREADS = {
    "tp2 dp2 sp fsdp": Case(tensor=2, data=2, sequence_parallel=True, fsdp=True),
    "tp4, 2 kv heads": Case(tensor=4, attention="blocks"),
    "tp4 sp, 2 kv heads": Case(tensor=4, sequence_parallel=True),
    "pp2 tp2 sp": Case(pipeline=2, tensor=2, sequence_parallel=True),
    "pp2 dp2, interleaved": Case(pipeline=2, data=2, virtual_pipeline=2),
    "tp2 dp2 zero1": Case(tensor=2, data=2, zero1=True),
    "dp4 fsdp": Case(data=4, fsdp=True),
    "dp2 zero1": Case(data=2, zero1=True),
    "pp2, interleaved": Case(pipeline=2, virtual_pipeline=2, attention="blocks"),
}
CASES = {
    f"{name}: {spread}": replace(case, shape=shape, std=STD, steps=1)
    for name, shape in CONFIGS.items()
    for spread, case in SPREADS.items()
}
USUAL = (
    *(f"{name}: tp2 dp2 sp fsdp" for name in ("qwen2", "gemma2")),
    *("olmo2: tp4 sp, 2 kv heads", "gemma3: pp2 tp2 sp"),
)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    return outcomes(asked(request, CASES))


@pytest.mark.parametrize("name", but_for(USUAL, CASES))
def test_as_the_plain_model(found: dict[str, list[Outcome]], name: str) -> None:
    assert_as(found[name], oracle(CASES[name]))


def assert_as(ranks: list[Outcome], want: Outcome) -> None:
    for got in ranks:
        for loss in (got.loss, got.evaluated, got.restarted):
            assert abs(loss - want.loss) <= LOSS_TOLERANCE * max(1.0, want.loss)
        assert got.norm == pytest.approx(want.norm, rel=NORM_TOLERANCE)
        assert got.parameter_norm == pytest.approx(want.parameter_norm, rel=1e-6)
    gradient = worst(merged([r.gradients for r in ranks]), want.gradients, relative=True)
    print(f"loss {abs(ranks[0].loss - want.loss):.1e}, gradient {gradient[0]:.1e} {gradient[1]}")
    assert gradient[0] <= GRADIENT_TOLERANCE, gradient
