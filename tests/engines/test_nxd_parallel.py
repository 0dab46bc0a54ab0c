"""The NxD engine over tensor-parallel and data-parallel ranks, against the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nxd_fixture import (
    CONFIG,
    Case,
    dataset,
    engine,
    examples,
    objective,
    plain,
    require_nxd,
    run_ranks,
    weights,
    whole,
)
from oracle import dpo_loss, gradients, orpo_loss

pytestmark = pytest.mark.nxd

CASES = [
    Case(tp=2),
    Case(tp=2, sp=True),
    Case(tp=2, qkv="fused"),
    Case(tp=2, qkv="separate"),
    Case(tp=2, qkv="separate", sp=True),
    Case(tp=4, kv=2),
    Case(tp=4, kv=2, sp=True),
    Case(tp=4, kv=2, sp=True, qkv="fused"),
    Case(tp=2, dp=2, sp=True),
]
ODD_ROW = 75
"""Tokens that two ranks do not divide."""
LOSSES = ["dpo", "orpo"]
TOLERANCE = 1e-6


def step(case: Case, loss: str) -> dict[str, Any]:
    built = engine(case)
    built.load_weights(weights(0))
    built.load_reference(weights(1))
    # A row's length is made up for where tokens are split; a pair's prompt is shared here and there.
    layout, row = ("shared_prompt", ODD_ROW) if loss == "orpo" else ("packed", None)
    data = dataset(built.topology, layout, row)  # type: ignore[arg-type]
    output = built.step(data[tuple(range(len(examples())))], objective(loss))
    found = {name: p.grad.clone() for name, p in built.named_parameters()}
    norm = built.clip_gradients(0.1)
    clipped = {name: p.grad.clone() for name, p in built.named_parameters()}
    return {
        "loss": output.loss,
        "metrics": output.metrics,
        "gradients": found,
        "norm": norm,
        "clipped": clipped,
        "parameter_norm": built.parameter_norm().detach(),
        "topology": built.topology,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Case, str], Any]:
    require_nxd()
    found: dict[tuple[Case, str], Any] = {}
    for world in sorted({case.world for case in CASES}):
        keys = [(case, loss) for case in CASES if case.world == world for loss in LOSSES]
        jobs = [(step, (case, loss)) for case, loss in keys]
        found |= dict(zip(keys, run_ranks(world, jobs, tmp_path_factory.mktemp("ranks")), strict=True))
    return found


def wanted(loss: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = plain(0)
    value = (
        dpo_loss(model, plain(1), examples().examples, 0.1)
        if loss == "dpo"
        else orpo_loss(model, examples().examples, 0.1)
    )
    return value.detach(), gradients(value, model)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_the_plain_models(results: Any, case: Case, loss: str) -> None:
    """Loss to 1e-6, gradients to 1e-6 of the largest entry; the norm, each weight once; clipped by it."""
    ranks = results[case, loss]
    value, gradient = wanted(loss)
    largest = max(float(g.abs().max()) for g in gradient.values())
    for rank in ranks:
        assert abs(float(rank["loss"] - value)) <= TOLERANCE * max(1.0, float(value))
    for copy in range(case.dp):
        shards = ranks[copy * case.tp : (copy + 1) * case.tp]
        got = whole(case, CONFIG, [rank["gradients"] for rank in shards])
        errors = {name: float((got[name] - g).abs().max()) / largest for name, g in gradient.items()}
        assert max(errors.values()) <= TOLERANCE, errors
        norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
        clipped = whole(case, CONFIG, [rank["clipped"] for rank in shards])
        for name, tensor in clipped.items():
            assert torch.allclose(tensor, got[name] * 0.1 / norm, rtol=1e-4, atol=1e-9)
        for rank in shards:
            assert float(rank["norm"]) == pytest.approx(norm, rel=1e-6)
            parameters = torch.cat([p.detach().flatten() for p in plain(0).parameters()])
            assert float(rank["parameter_norm"]) == pytest.approx(float(parameters.norm()), rel=1e-6)
