"""The native engine spread over processes, in fp32, against the plain model in one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from parallel_fixture import Case, Outcome, merged, oracle, outcomes, worst

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-6
"""Of a parameter's largest gradient."""
NORM_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 1e-5
"""After 5 AdamW steps with active clipping."""

SPREADS = {
    "tp2": Case(tensor=2),
    "tp2 sp": Case(tensor=2, sequence_parallel=True),
    "tp4 sp, 2 kv heads": Case(tensor=4, sequence_parallel=True),
    "tp4, 2 kv heads": Case(tensor=4),
    "dp4": Case(data=4),
    "dp4 zero1": Case(data=4, zero1=True),
    "dp4 fsdp": Case(data=4, fsdp=True),
    "tp2 dp2 sp": Case(tensor=2, data=2, sequence_parallel=True),
    "tp2 dp2 sp zero1": Case(tensor=2, data=2, sequence_parallel=True, zero1=True),
    "tp2 dp2 sp fsdp": Case(tensor=2, data=2, sequence_parallel=True, fsdp=True),
}
CASES = {
    f"{name}, {loss}": replace(case, loss=loss) for name, case in SPREADS.items() for loss in ("dpo", "orpo")
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[Outcome]]:
    return outcomes(CASES)


@cache
def wanted(loss: str) -> Outcome:
    return oracle(Case(loss=loss))


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(found: dict[str, list[Outcome]], name: str) -> None:
    ranks, want = found[name], wanted(CASES[name].loss)
    for got in ranks:
        assert abs(got.loss - want.loss) <= LOSS_TOLERANCE
        assert abs(got.evaluated - want.loss) <= LOSS_TOLERANCE
        assert got.norm == pytest.approx(want.norm, rel=NORM_TOLERANCE)
        assert got.parameter_norm == pytest.approx(want.parameter_norm, rel=NORM_TOLERANCE)
    gradient = worst(merged([r.gradients for r in ranks]), want.gradients, relative=True)
    weight = worst(merged([r.weights for r in ranks]), want.weights, relative=False)
    loss = abs(ranks[0].loss - want.loss)
    print(f"{name}: loss {loss:.1e}, gradient {gradient[0]:.1e}, weight {weight[0]:.1e}")
    assert gradient[0] <= GRADIENT_TOLERANCE, gradient
    assert weight[0] <= WEIGHT_TOLERANCE, weight
