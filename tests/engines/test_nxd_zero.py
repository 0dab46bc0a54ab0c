"""ZeRO-1 on torch_xla's CPU device: NxD outside of its CPU mode, with graphs, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_fixture import (
    CONFIG,
    dataset,
    examples,
    held,
    objective,
    plain,
    require_nxd,
    run_ranks,
    weights,
)
from oracle import gradients, orpo_loss

from nxdt_align.engines.nxd.settings import Precision, SaveOptions

pytestmark = [pytest.mark.nxd, pytest.mark.xla]
STEPS, LIMIT = 3, 1.0
# An update is lr * m / (sqrt(v) + eps), so that with AdamW's own eps of 1e-8 the rounding of a gradient of
# 1e-8 moves an entry by a part of its step of 1e-2. Measured here, largest difference of a weight from the
# plain model's: eps 1e-8: 9.5e-5, at a gradient of 1.8e-8; 1e-5: 2.7e-6; 1e-4: 2.1e-6; 1e-3: 4.2e-7. The
# plain model in float32 is as far from itself in float64: 6.2e-5, 2.2e-6, 7.8e-7, 2.7e-7.
SETTINGS = {"lr": 1e-2, "weight_decay": 0.01, "eps": 1e-3}
PRECISIONS = {
    "fp32": Precision(),
    "masters": Precision(torch.bfloat16, masters=True),
    "low sums": Precision(torch.bfloat16, masters=True, float32_sums=False),
    "bf16": Precision(torch.bfloat16),
}
BEHIND = ("fp32", "masters")
"""Of those, what is also saved in the background."""


def start(precision: Any, **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    from nxdt_align.engines.nxd import compat

    platform = compat.start("xla")
    from nxdt_align.engines.nxd.engine import NxDEngine
    from nxdt_align.engines.nxd.mesh import make_mesh
    from nxdt_align.engines.nxd.settings import Parallel

    mesh = make_mesh(Parallel(zero1=True, qkv="fused"), platform)
    built = NxDEngine(CONFIG, mesh, precision=precision, **settings)
    built.load_weights(weights(0))
    optimizer = torch.optim.AdamW([p for _, p in built.named_parameters()], **SETTINGS)
    return built, built.adopt_optimizer(optimizer)


def train(built: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[tuple[float, float]]:
    found = []
    batches = [b.to(built.device) for b in dataset(built.topology)[tuple(range(len(examples())))]]
    for _ in range(steps):
        output = built.step(batches, objective("orpo"))
        norm = built.clip_gradients(LIMIT)
        optimizer.step()
        built.mark_step()
        found.append((float(output.loss), float(norm)))
    return found


def run(kind: str, folder: str) -> dict[str, Any]:
    precision = PRECISIONS[kind]
    built, optimizer = start(precision)
    curve = train(built, optimizer, STEPS)
    once = {name: p.detach().cpu() for name, p in built.named_parameters()}
    first, optimizer = start(precision)
    train(first, optimizer, 2)
    first.save(Path(folder), optimizer, {"global_step": 2})
    second, second_optimizer = start(precision)
    second.load(Path(folder), second_optimizer)
    resumed = train(second, second_optimizer, STEPS - 2)
    twice = {name: p.detach().cpu() for name, p in second.named_parameters()}
    whole = dict(built.whole_parameters())
    rows = second_optimizer.base_optimizer
    return {
        "curve": curve,
        "resumed": resumed,
        "once": once,
        "twice": twice,
        "whole": whole,
        "rows": {row.dtype for group in rows.param_groups for row in group["params"]},
        "state": {state[key].dtype for state in rows.state.values() for key in ("exp_avg", "exp_avg_sq")},
    }


def run_behind(kind: str, folder: str) -> dict[str, Any]:
    """Gone on from a checkpoint with a file per tensor, of which none is written before the run that it is of
    has made another step."""
    settings = {"precision": PRECISIONS[kind], "save_options": SaveOptions(xser=True)}
    first, optimizer = start(**settings)
    train(first, optimizer, 2)
    with held() as go:
        first.save(Path(folder), optimizer, {"global_step": 2}, background=True)
        train(first, optimizer, 1)
        was_there = Path(folder).exists()
        go.set()
        first.finish_saving()
    second, optimizer = start(**settings)
    second.load(Path(folder), optimizer)
    resumed = train(second, optimizer, STEPS - 2)
    weights = {name: p.detach().cpu() for name, p in second.named_parameters()}
    return {"was_there": was_there, "resumed": resumed, "weights": weights}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    require_nxd()
    folder = tmp_path_factory.mktemp("zero")
    jobs: dict[Any, Any] = {kind: (run, (kind, str(folder / kind))) for kind in PRECISIONS}
    jobs |= {(kind, "behind"): (run_behind, (kind, str(folder / f"{kind}-behind"))) for kind in BEHIND}
    ranks = run_ranks(1, list(jobs.values()), folder / "ranks", gloo=False)
    return {key: found for key, (found,) in zip(jobs, ranks, strict=True)}


def test_it_trains_as_adamw_does(results: Any) -> None:
    """Three steps with clipping on the plain model: losses and norms to 2e-6, every weight to 1e-6."""
    model = plain(0)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    for loss, norm in results["fp32"]["curve"]:
        value = orpo_loss(model, examples().examples, 0.1)
        for (_, parameter), gradient in zip(
            model.named_parameters(), gradients(value, model).values(), strict=True
        ):
            parameter.grad = gradient
        wanted = torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        assert loss == pytest.approx(float(value.detach()), rel=2e-6)
        assert norm == pytest.approx(float(wanted), rel=2e-6)
    for name, parameter in model.named_parameters():
        error = (results["fp32"]["whole"][name] - parameter.detach()).abs()
        assert float(error.max()) <= 1e-6, name


@pytest.mark.parametrize("kind", ["masters", "low sums", "bf16"])
def test_bf16_trains_near_float32(results: Any, kind: str) -> None:
    found, exact = results[kind], results["fp32"]["curve"]
    assert all(t.dtype == torch.bfloat16 for t in found["once"].values())
    for (loss, _), (wanted, _) in zip(found["curve"], exact, strict=True):
        assert loss == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("kind", PRECISIONS)
def test_rows_and_states_are_float32_where_there_are_masters(results: Any, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    assert results[kind]["rows"] == results[kind]["state"] == {dtype}


@pytest.mark.parametrize("kind", PRECISIONS)
def test_a_run_goes_on_bit_for_bit(results: Any, kind: str) -> None:
    found = results[kind]
    assert found["resumed"] == found["curve"][2:]
    for name, tensor in found["once"].items():
        assert torch.equal(tensor, found["twice"][name]), name


@pytest.mark.parametrize("kind", BEHIND)
def test_a_save_in_the_background_holds_the_values_of_its_moment(results: Any, kind: str) -> None:
    behind = results[kind, "behind"]
    assert not behind["was_there"] and behind["resumed"] == results[kind]["curve"][2:]
    for name, tensor in results[kind]["once"].items():
        assert torch.equal(tensor, behind["weights"][name]), name
