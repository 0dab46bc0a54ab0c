"""Graphs recorded instead of run, without neuronx-distributed: engine native on torch_xla's CPU device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nxdt_align.planning.devices import DEVICES
from nxdt_align.planning.graph_report import report

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")

CODE = """
import json
from dataclasses import asdict
import torch
from dataclasses import replace
from oracle import TINY, random_examples
from nxdt_align.batch import Topology
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.data.packing import RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines import xla
tracer = xla.start_tracing()
from nxdt_align.engines.native.settings import Precision
from nxdt_align.engines.native.xla_engine import XlaEngine
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.training.optim import build_optimizer
from nxdt_align.weights.hf import FreshWeights
from torch_xla.debug import metrics

config = replace(TINY, hidden_size=256, head_dim=64)
examples = random_examples(4, seed=9, prompt=(900, 1000), response=(500, 520))
settings = {"examples_per_step": 4, "seq_length": 2048, "fixed_micro_batches": True}
planner = RowPlanner(examples, "shared_prompt", **settings)
batches = StepDataset(examples, planner, "shared_prompt", Topology())[range(4)]
engine = XlaEngine(config, DenseAttention(), precision=Precision(compute=torch.bfloat16), device=xla.device())
engine.compiler = tracer
engine.load_weights(FreshWeights(config, 0))
engine.load_reference(FreshWeights(config, 1))
optimizer = build_optimizer(engine.named_parameters(), "adamw", {"lr": 1e-3})
for _ in range(3):
    output = engine.step([b.to(engine.device) for b in batches], GlobalMeanObjective(DPOLoss(DPOConfig())))
    engine.clip_gradients(1.0)
    optimizer.step()
    engine.mark_step()
    assert engine.fetch([output.loss]) == [0.0]
compiled = metrics.counter_value("UncachedCompile") or 0
print(json.dumps({"compiled": compiled, "traced": [asdict(graph) for graph in tracer.traced]}))
"""


class Graph:
    """One out of the process."""

    def __init__(self, fields: dict[str, object]) -> None:
        self.__dict__ = fields


def test_steps_are_recorded_and_nothing_runs() -> None:
    """A first step and one that all later ones repeat, as where they are compiled (test_native_xla.py); and
    none of them has a finding."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiled"] == 0
    steps = [graph for graph in found["traced"] if graph["name"] == "training step"]
    keys = [graph["key"] for graph in steps]
    assert len(keys) == 3 and keys[0] != keys[1] == keys[2]
    reports = [report(Graph(graph), DEVICES["trn1"], low_precision=True) for graph in steps]  # type: ignore[arg-type]
    assert [each.findings for each in reports] == [[], [], []]
    assert all(each.flops > 0 for each in reports)
