"""Whole runs on torch_xla's CPU device: COMPILE=1, then training with validation and a resume.

Each run is a process of its own, as graphs are compiled and counted by process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training_fixture import Project, scalars

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")

STEPS = 11
"""Two epochs of 22 pairs, 4 a step, but for the last step."""
SETTINGS = (
    "data.buckets=[128,256]",
    "exp_manager.log_parameter_norm=True",
    "exp_manager.log_gradient_norm=True",
    "exp_manager.fail_on_recompile=True",
    "trainer.log_every_n_steps=1",
    "exp_manager.export_hf=False",
)
STUB = """
import gc, sys, torch, torch_xla
from nxdt_align.engines.native.xla import XlaEngine
from nxdt_align.cli import main

def on_device():
    kinds = (torch.Tensor, torch.nn.Parameter)
    return [t for t in gc.get_objects() if type(t) in kinds and t.device.type == "xla"]

mark, asked = XlaEngine.mark_step, XlaEngine.response_logps
def mark_then_zero(self):
    mark(self)
    with torch.no_grad():
        # A product: constants of one shape would share memory, which is seen in the graphs that read them.
        zero = torch.zeros(1).to(self.device).reshape(())
        for tensor in on_device():
            if tensor.is_floating_point():
                tensor.mul_(zero)
    mark(self)

XlaEngine.mark_step = mark_then_zero
XlaEngine.fetch = lambda self, values: [0.0] * len(values)
XlaEngine.response_logps = lambda self, *a, **k: torch.zeros_like(asked(self, *a, **k).cpu()).to(self.device)
sys.exit(main())
"""
"""The command line on a device that computes nothing: every output of a step is zero, as while Neuron's
graphs are extracted. It is a simulation: the device does compute, zeroes are put in place behind each step by
graphs that are then in the manifest too, and weights keep the values of their files until the first step, as
whatever no graph has made does on Neuron."""


@dataclass
class Finished:
    stdout: str
    log: str

    @property
    def graphs(self) -> tuple[int, int]:
        """Compiled by a run, and those of them that its manifest does not have."""
        found = re.search(r"graphs: (\d+) compiled, (\d+) outside the manifest", self.log)
        assert found is not None, self.log[-2000:]
        return int(found[1]), int(found[2])


def run(project: Project, experiments: str, *overrides: str, compile: str = "0", code: str = "") -> Finished:
    program = ["-c", code] if code else ["-m", "nxdt_align"]
    where = (f"exp_manager.exp_dir={project.root}/{experiments}", "trainer.accelerator=xla")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *program, *project.arguments(*SETTINGS, *where, *overrides)],
        env={**os.environ, "COMPILE": compile, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Finished(done.stdout, done.stderr)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.create(tmp_path_factory.mktemp("xla"))
    shape = json.loads((project.root / "config.json").read_text())
    (project.root / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 1}))
    return project


@pytest.fixture(scope="module")
def trial(project: Project) -> tuple[Finished, list[Path]]:
    """A trial run of a device that computes zeros, and the files that it made."""
    before = set(project.root.rglob("*"))
    # Setting to zero is itself a graph, and another one as values pile up.
    settings = (f"trainer.max_steps={STEPS}", "exp_manager.fail_on_recompile=False")
    done = run(project, "ahead", *settings, compile="1", code=STUB)
    return done, sorted(path for path in set(project.root.rglob("*")) - before if path.is_file())


@pytest.fixture(scope="module")
def ahead(project: Project, trial: Any) -> list[Finished]:
    """The run itself behind the trial, broken off in its second epoch and taken up again."""
    return [run(project, "ahead", f"trainer.max_steps={steps}") for steps in (7, STEPS)]


def test_totals_are_printed_and_the_manifest_is_all_that_is_written(trial: Any, project: Project) -> None:
    done, files = trial
    manifest = project.root / "ahead" / "compile" / "run_dpo.json"
    assert files == [manifest]
    content = json.loads(manifest.read_text())
    count = len(content["graphs"])
    lines = done.stdout.splitlines()
    assert f"Total graphs: {count}" in lines
    assert f"Total successful compilations: {count}" in lines
    assert "Total failed compilations: 0" in lines
    names = {graph["name"] for graph in content["graphs"]}
    assert names >= {"training step", "validation step", "log-probabilities without gradients"}
    trained = {shape[1] for g in content["graphs"] if g["name"] == "training step" for shape in g["shapes"]}
    assert trained == {128, 256}, "also the bucket that no step needs"
    assert len({graph["hash"] for graph in content["graphs"]}) == count


def test_no_graph_of_two_epochs_validation_and_a_resume_is_outside_the_manifest(
    ahead: list[Finished], project: Project
) -> None:
    """Neither of the run that is broken off in its second epoch nor of the one that takes it up."""
    for part in ahead:
        compiled, outside = part.graphs
        assert compiled > 0 and outside == 0, part.log[-3000:]
    assert "going on from this run's own checkpoint" in ahead[1].log
    curves = scalars(project.only_run("ahead"))
    assert [step for step, _ in curves["reduced_train_loss"]] == list(range(1, STEPS + 1))
    assert len(curves["val_loss"]) == STEPS // 3


def test_orpo_trains_as_on_the_cpu(project: Project) -> None:
    """1e-5 on the first loss, 1e-4 after three AdamW steps."""
    orpo = ("~model_alignment_strategy.dpo", "model_alignment_strategy.orpo.beta=0.1")
    steps = ("trainer.max_steps=3", "trainer.limit_val_batches=0")
    run(project, "orpo-xla", *orpo, *steps)
    where = ("trainer.accelerator=cpu", f"exp_manager.exp_dir={project.root}/orpo-cpu")
    assert project.train(*SETTINGS, *orpo, *steps, *where) == 0
    got, want = (scalars(project.only_run(f"orpo-{device}")) for device in ("xla", "cpu"))
    for tag in ("reduced_train_loss", "gradient_norm", "nll_loss"):
        curves = [[value for _, value in curve[tag]] for curve in (got, want)]
        assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-4, abs=1e-4), tag
        assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-5, abs=1e-5), tag


def test_compiling_ahead_changes_no_value(ahead: list[Finished], project: Project) -> None:
    """Against one run that was neither compiled ahead nor broken off: every curve bit for bit; and against
    the plain CPU to 1e-4 after 11 AdamW steps (1e-5 of the loss before the first)."""
    never = run(project, "never", f"trainer.max_steps={STEPS}")
    assert "COMPILE=1 would list them" in never.log
    where = ("trainer.accelerator=cpu", f"exp_manager.exp_dir={project.root}/cpu")
    assert project.train(*SETTINGS, *where, f"trainer.max_steps={STEPS}") == 0
    curves = {name: scalars(project.only_run(name)) for name in ("ahead", "never", "cpu")}
    for tag, wanted in curves["never"].items():
        if not tag.startswith("throughput"):
            assert curves["ahead"][tag] == wanted, tag
    for tag in ("reduced_train_loss", "gradient_norm", "parameter_norm", "val_loss", "lr"):
        got, want = ([value for _, value in curves[name][tag]] for name in ("ahead", "cpu"))
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4), tag
        assert got[0] == pytest.approx(want[0], rel=1e-5, abs=1e-5), tag
