"""fp16 with its loss scale: what overflows is skipped by all ranks alike, and nothing small is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from matrix import asked, but_for
from parallel_fixture import (
    CLIP,
    LOSSES,
    Case,
    Outcome,
    adamw,
    merged,
    oracle,
    outcomes,
    run_case,
    run_parallel,
    whole,
)
from torch import Tensor, nn

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native import gradients
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.gradients import LossScale
from nxdt_align.engines.native.mesh import Group
from nxdt_align.engines.native.settings import Precision
from nxdt_align.losses.objective import GlobalMeanObjective

FP16 = Precision(compute=torch.float16)
LOSS_TOLERANCE = 1e-3
"""fp16 keeps 11 bits: 0.05% a rounding. Sums of up to 20 log-probabilities, times beta 0.1."""
GRADIENT_TOLERANCE = 0.01
"""Relative L2 error of a parameter's gradient."""
HUGE, STEPS = 2.0**28, 16
"""A scale that overflows for about 8 steps, and the steps of a run that starts with it."""

ALONE = Case(precision=FP16, steps=2)
SPREADS = {
    "dp2": Case(data=2, precision=FP16, steps=2),
    "dp2 zero1": Case(data=2, zero1=True, precision=FP16, steps=2),
    "dp2 fsdp": Case(data=2, fsdp=True, precision=FP16, steps=2),
    "tp2 sp": Case(tensor=2, sequence_parallel=True, precision=FP16, steps=2),
    "pp2": Case(pipeline=2, precision=FP16, steps=2),
    "dp2 fsdp, aot": Case(data=2, fsdp=True, loss="aot", precision=FP16, steps=2),
}


def assert_near(ranks: list[Outcome], want: Outcome) -> None:
    for got in ranks:
        for loss, wanted in ((got.loss, want.loss), (got.evaluated, want.loss), (got.final, want.final)):
            assert abs(loss - wanted) <= LOSS_TOLERANCE
        assert got.norm == pytest.approx(want.norm, rel=GRADIENT_TOLERANCE)
    gradients = merged([r.gradients for r in ranks])
    assert gradients.keys() == want.gradients.keys()
    for name, wished in want.gradients.items():
        assert gradients[name].dtype == torch.float32
        error = float((gradients[name] - wished).norm() / wished.norm())
        assert error <= GRADIENT_TOLERANCE, f"{name}: {error:.4f}"


def truth(case: Case) -> Outcome:
    """fp32 in one process: the plain model where it has the loss."""
    plain = replace(case.alone, precision=Precision())
    return run_case(0, plain) if case.loss == "aot" else oracle(plain)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    return outcomes(asked(request, SPREADS))


@pytest.mark.parametrize("loss", ["dpo", "orpo", "aot"])
def test_one_process_is_near_fp32(loss: str) -> None:
    case = replace(ALONE, loss=loss)
    assert_near([run_case(0, case)], truth(case))


@pytest.mark.parametrize("name", but_for(["dp2 fsdp", "tp2 sp", "pp2"], SPREADS))
def test_two_ranks_are_near_fp32(found: dict[str, list[Outcome]], name: str) -> None:
    assert_near(found[name], truth(SPREADS[name]))


# A scale that is too large, or too small


@dataclass
class Course:
    """Some steps of a run: what the engine says after each, whether it was skipped, and the loss."""

    status: list[dict[str, float]]
    skips: list[bool]
    losses: list[float]
    moved: list[bool]
    """Whether any weight changed."""
    weights: dict[str, Tensor]


def set_scale(engine: NativeEngine, scale: float) -> None:
    assert engine._loss_scale is not None
    engine._loss_scale.load_state({"scale": scale, "good_steps": 0, "skipped_steps": 0})


def go_on(
    engine: NativeEngine, rank: int, case: Case, steps: int, optimizer: torch.optim.Optimizer | None = None
) -> Course:
    batches = case.micro_batches(rank, case.examples())
    parameters = [p for _, p in engine.named_parameters()]
    optimizer = optimizer or adamw(parameters)
    course = Course([], [], [], [], {})
    for _ in range(steps):
        before = [whole(p) for p in parameters]
        output = engine.step(batches, GlobalMeanObjective(LOSSES[case.loss]))
        engine.clip_gradients(CLIP)
        if not engine.skips_step:
            optimizer.step()
        course.status.append(engine.status())
        course.skips.append(engine.skips_step)
        course.losses.append(float(output.loss))
        course.moved.append(
            any(not torch.equal(whole(p), b) for p, b in zip(parameters, before, strict=True))
        )
    course.weights = {name: whole(p) for name, p in engine.named_parameters()}
    return course


def run_overflowing(rank: int, world: int, cases: Sequence[Case]) -> list[Course]:
    found = []
    for case in cases:
        engine = case.engine(rank)
        set_scale(engine, HUGE)
        found.append(go_on(engine, rank, case, STEPS))
    return found


def assert_recovers(course: Course) -> None:
    """Each skipped step halves the scale, moves nothing and says its loss; then training goes on."""
    skipped = sum(course.skips)
    assert 5 <= skipped <= STEPS - 5, course.status
    assert course.skips == [True] * skipped + [False] * (STEPS - skipped)
    assert [s["loss_scale"] for s in course.status[:skipped]] == [HUGE / 2**n for n in range(1, skipped + 1)]
    assert {s["loss_scale"] for s in course.status[skipped:]} == {HUGE / 2**skipped}
    assert [s["skipped_steps"] for s in course.status] == [min(n, skipped) for n in range(1, STEPS + 1)]
    assert course.moved == [not skip for skip in course.skips]
    assert len(set(course.losses[: skipped + 1])) == 1, "the loss of weights that stay"
    assert course.losses[-1] < course.losses[0]
    assert all(bool(w.isfinite().all()) for w in course.weights.values())


@pytest.mark.parametrize("loss", ["dpo", "aot"])
def test_an_overflow_is_skipped_and_training_goes_on(loss: str) -> None:
    (course,) = run_overflowing(0, 1, [replace(ALONE, loss=loss)])
    assert_recovers(course)


@pytest.mark.full
def test_all_ranks_skip_the_same_steps() -> None:
    names = ["dp2", "dp2 fsdp", "tp2 sp", "pp2"]
    ranks = run_parallel(2, run_overflowing, [SPREADS[name] for name in names])
    for index in range(len(names)):
        first, second = (courses[index] for courses in ranks)
        assert_recovers(first)
        assert (first.status, first.losses) == (second.status, second.losses)


def one_rank_overflows(rank: int, world: int) -> tuple[bool, float, Tensor]:
    scale = LossScale(torch.device("cpu"), Group(rank, world))
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, torch.inf if rank == 1 else 2.0, 3.0]) * scale.value
    scale.unscale([parameter])
    return scale.skips_step, scale.value, parameter.grad


def test_a_rank_without_an_overflow_skips_too() -> None:
    clean, overflowed = run_parallel(2, one_rank_overflows)
    assert clean[:2] == overflowed[:2] == (True, 2.0**15)
    assert clean[2].tolist() == [1.0, 2.0, 3.0] and not overflowed[2].isfinite().all()


def test_what_fp16_would_lose_is_kept() -> None:
    """Most gradients that backward computes at a scale of 2^-13 are below fp16's smallest number, 6e-8; at
    that of a new run none is."""
    case = replace(ALONE, steps=1)
    want = oracle(replace(case, precision=Precision())).gradients
    errors = {}
    for scale in (2.0**-13, 2.0**16):
        engine = case.engine(0)
        set_scale(engine, scale)
        engine.step(case.micro_batches(0, case.examples()), GlobalMeanObjective(LOSSES["dpo"]))
        pairs = [(p.grad, want[name]) for name, p in engine.named_parameters() if p.grad is not None]
        errors[scale] = max(float((got - wished).norm() / wished.norm()) for got, wished in pairs)
    assert errors[2.0**16] <= GRADIENT_TOLERANCE and errors[2.0**-13] >= 0.2, errors


def test_the_scale_doubles_after_so_many_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "GROWTH_INTERVAL", 3)
    scale, parameter = LossScale(torch.device("cpu"), Group(0, 1)), nn.Parameter(torch.zeros(2))
    values = []
    for number in (1.0, 1.0, torch.nan, 1.0, 1.0, 1.0, 1.0):
        parameter.grad = torch.full((2,), number)
        scale.unscale([parameter])
        values.append(scale.value / 2.0**15)
    assert values == [2, 2, 1, 1, 1, 2, 2]
    assert scale.skipped_steps == 1 and not scale.skips_step


def test_gradients_that_no_scale_can_mend_are_an_error() -> None:
    scale, parameter = LossScale(torch.device("cpu"), Group(0, 1)), nn.Parameter(torch.zeros(2))
    with pytest.raises(EngineError, match=r"not finite even at a loss scale of 0\.000976562, which no scale"):
        for _ in range(100):
            parameter.grad = torch.full((2,), torch.nan)
            scale.unscale([parameter])
    assert scale.skipped_steps == 27


# Checkpoints


def test_a_resumed_run_goes_on_with_the_scale_and_its_good_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved when a step short of growing, after skipped ones."""
    monkeypatch.setattr(gradients, "GROWTH_INTERVAL", 4)
    straight = ALONE.engine(0)
    optimizer = adamw([p for _, p in straight.named_parameters()])
    set_scale(straight, HUGE)
    while straight._loss_scale is not None and int(straight._loss_scale._good_steps) < 3:
        go_on(straight, 0, ALONE, 1, optimizer)
    straight.save(tmp_path / "saved", optimizer, {"global_step": 1})
    want = go_on(straight, 0, ALONE, 4, optimizer)

    resumed = ALONE.engine(0)
    fresh = adamw([p for _, p in resumed.named_parameters()])
    resumed.load(tmp_path / "saved", None)
    resumed.load(tmp_path / "saved", fresh)
    got = go_on(resumed, 0, ALONE, 4, fresh)
    assert (got.status, got.losses) == (want.status, want.losses)
    assert all(torch.equal(got.weights[name], want.weights[name]) for name in want.weights)
    assert want.status[0]["skipped_steps"] >= 5


def test_other_precisions_have_no_scale(tmp_path: Path) -> None:
    """A checkpoint of theirs starts with the first scale, and theirs ignores one."""
    case = replace(ALONE, precision=Precision(compute=torch.bfloat16))
    low, scaled = case.engine(0), ALONE.engine(0)
    assert low.status() == {} and not low.skips_step
    low.save(tmp_path / "bf16", None, {})
    assert "loss_scale" not in scaled.load(tmp_path / "bf16", None)
    assert scaled.status() == {"loss_scale": 2.0**16, "skipped_steps": 0.0}
    scaled.save(tmp_path / "fp16", None, {})
    low.load(tmp_path / "fp16", None)
    assert low.status() == {}
