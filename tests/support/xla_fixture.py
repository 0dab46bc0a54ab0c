"""Whole runs on torch_xla's CPU device, each a process of its own, as graphs are compiled and counted by
process; and a device that computes nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from training_fixture import Project, scalars

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
from nxdt_align.run.native import NativeParts
from nxdt_align.run.nxd import NxDParts
from nxdt_align.cli import main
from nxdt_align.engines import xla

def on_device():
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [t for t in gc.get_objects() if type(t) in kinds and t.device.type == "xla"]
    # In the order in which they were made, which writing to them renews and in which a graph has its
    # outputs: in the collector's own order, a step's outputs stand otherwise than without this stub.
    return sorted(found, key=torch_xla._XLAC._xla_get_tensor_id)

def zeroing(mark):
    def mark_then_zero():
        mark()
        with torch.no_grad():
            # A product: constants of one shape would share memory, which is seen in the graphs that read it.
            zero = torch.zeros(1).to(xla.device()).reshape(())
            for tensor in on_device():
                if tensor.is_floating_point():
                    tensor.mul_(zero)
        xla.sync()
    return mark_then_zero

def stub(build):
    def engine(self, *adapters):
        built = build(self, *adapters)
        asked = built.response_logps
        built.mark_step = zeroing(built.mark_step)
        built.fetch = lambda values: [0.0] * len(values)
        built.response_logps = lambda *a, **k: torch.zeros_like(asked(*a, **k).cpu()).to(built.device)
        return built
    return engine

NativeParts.engine, NxDParts.engine = stub(NativeParts.engine), stub(NxDParts.engine)
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


def make_project(root: Path) -> Project:
    """One layer, as most of the time is the compiler's."""
    project = Project.create(root)
    shape = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 1}))
    return project


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


def dry_run(project: Project, experiments: str, *overrides: str) -> tuple[Finished, list[Path]]:
    """A dry run on a device that computes zeros, and the files that it made."""
    before = set(project.root.rglob("*"))
    # Setting to zero is itself a graph, and another one as values pile up.
    settings = (f"trainer.max_steps={STEPS}", "exp_manager.fail_on_recompile=False")
    done = run(project, experiments, *overrides, *settings, compile="1", code=STUB)
    return done, sorted(path for path in set(project.root.rglob("*")) - before if path.is_file())


def broken_off(project: Project, experiments: str, *overrides: str) -> list[Finished]:
    """A run that stops in its second epoch, and the one that takes it up."""
    return [run(project, experiments, *overrides, f"trainer.max_steps={steps}") for steps in (7, STEPS)]


def assert_all_was_compiled_ahead(parts: list[Finished], run: Path) -> None:
    """``broken_off``'s runs needed no graph that the dry run had not listed, and together are one run."""
    for part in parts:
        compiled, outside = part.graphs
        assert compiled > 0 and outside == 0, part.log[-3000:]
    assert "resuming from this run's own checkpoint" in parts[1].log
    curves = scalars(run)
    assert [step for step, _ in curves["reduced_train_loss"]] == list(range(1, STEPS + 1))
    assert len(curves["val_loss"]) == STEPS // 3
