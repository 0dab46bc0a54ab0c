"""The graphs of engine nxd on torch_xla's CPU device: what a step compiles, and one behind a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_fixture import CONFIG, dataset, examples, forget_groups, objective, require_nxd, run_ranks, weights

from nxdt_align.config.alignment import DPOConfig
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective

pytestmark = [pytest.mark.nxd, pytest.mark.xla]
STEPS = 4
KINDS = {
    "fp32": (False, False),
    "bf16 with masters": (True, False),
    "fp32 under ZeRO-1": (False, True),
    "bf16 under ZeRO-1": (True, True),
}
"""Whether it computes in bf16, with float32 masters; whether under ZeRO-1."""


class Trainer:
    """An engine with its weights and its optimizer, in a run's order, and what is compiled for them.

    ``checkpoint``: where it goes on from; None for a new run.
    """

    def __init__(self, kind: str, xser: bool, checkpoint: Path | None) -> None:
        from nxdt_align.engines.nxd import compat

        platform = compat.start("xla")
        from nxdt_align.engines import xla
        from nxdt_align.engines.nxd.engine import NxDEngine
        from nxdt_align.engines.nxd.mesh import make_mesh
        from nxdt_align.engines.nxd.settings import Parallel, Precision, SaveOptions
        from nxdt_align.training.optim import build_optimizer

        forget_groups()
        is_low, zero1 = KINDS[kind]
        self.compilations = xla.XlaCompiler(tells_keys=False).count
        mesh = make_mesh(Parallel(zero1=zero1, qkv="split"), platform)  # which runs a graph of NxD's
        before = self.compilations()
        self.engine = NxDEngine(
            CONFIG,
            mesh,
            precision=Precision(torch.bfloat16, masters=True) if is_low else Precision(),
            save_options=SaveOptions(xser=xser, low_precision=torch.bfloat16),
        )
        self.batches = dataset(self.engine.topology, row=96)[tuple(range(len(examples())))]
        if checkpoint is None:
            self.engine.load_weights(weights(0))
        else:
            self.engine.load(checkpoint, None)
        settings = {"lr": 1e-3, "weight_decay": 0.01}
        parameters = self.engine.named_parameters()
        optimizer = build_optimizer(parameters, "adamw_fp32OptState", settings)
        self.optimizer = self.engine.adopt_optimizer(optimizer)
        if checkpoint is not None:
            self.engine.load(checkpoint, self.optimizer)
        self.compiled_at_start = self.compilations() - before

    def step(self) -> tuple[list[float], int]:
        """Loss and norm, and the graphs compiled for it."""
        before = self.compilations()
        output = self.engine.step([b.to(self.engine.device) for b in self.batches], objective("orpo"))
        norm = self.engine.clip_gradients(1.0)
        self.optimizer.step()
        self.engine.mark_step()
        values = self.engine.fetch([output.loss, norm])
        return values, self.compilations() - before


def train(kind: str, saved: int, xser: bool, folder: str) -> dict[str, Any]:
    """STEPS steps, saved behind one of them; then gone on with from there by new objects."""
    first = Trainer(kind, xser, None)
    found: dict[str, Any] = {"loading": first.compiled_at_start, "steps": []}
    for i in range(STEPS):
        if i == saved:
            before = first.compilations()
            first.engine.save(Path(folder), first.optimizer, {"global_step": i})
            found["saving"] = first.compilations() - before
        found["steps"].append(first.step())
    second = Trainer(kind, xser, Path(folder))
    found["resuming"] = second.compiled_at_start
    found["resumed"] = [second.step() for _ in range(STEPS - saved)]
    return found


def validate() -> list[int]:
    """Graphs compiled for each of several validation steps of a loss that couples the examples."""
    engine = (trained := Trainer("fp32", True, None)).engine
    engine.load_reference(None)
    counts = []
    for _ in range(20):
        before = trained.compilations()
        engine.evaluate(
            [b.to(engine.device) for b in trained.batches],
            GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1, loss_type=("aot",)))),
        )
        engine.mark_step()
        counts.append(trained.compilations() - before)
    return counts


CASES = [(kind, saved, xser) for kind in KINDS for saved, xser in ((1, True), (2, False))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    require_nxd()
    folder = tmp_path_factory.mktemp("graphs")
    jobs: list[Any] = [(train, (*case, str(folder / str(i)))) for i, case in enumerate(CASES)]
    jobs.append((validate, ()))
    found = run_ranks(1, jobs, folder / "ranks", gloo=False)
    return {case: of_rank for case, (of_rank,) in zip([*CASES, "coupled"], found, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_first_two_steps_compile(results: dict[Any, Any], case: Any) -> None:
    """The second one's optimizer has a state. Building, loading and saving are no graphs at all."""
    found = results[case]
    compiled = [count for _, count in found["steps"]]
    assert compiled[2:] == [0, 0], compiled
    assert (found["loading"], found["saving"]) == (0, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_behind_a_checkpoint_is_the_graph_of_one_behind_a_step(
    results: dict[Any, Any], case: Any
) -> None:
    """And gives its values bit for bit. Saved behind the first step, where every count is 1, or the
    second."""
    found = results[case]
    assert found["resuming"] == 0
    assert [count for _, count in found["resumed"]] == [0] * (STEPS - case[1])
    assert [values for values, _ in found["resumed"]] == [values for values, _ in found["steps"][case[1] :]]


def test_validation_of_a_loss_that_couples_examples_is_the_same_graphs(results: dict[Any, Any]) -> None:
    """What autograd's thread still held when a step ended was an output more, now and then."""
    counts = results["coupled"]
    assert counts[0] > 0 and counts[1:] == [0] * 19, counts
