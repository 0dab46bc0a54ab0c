"""Whole runs whose steps torch.compile compiles: COMPILE=1, then training with validation, and a resume."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from training_fixture import Project

from nxdt_align.engines.native import compiled
from nxdt_align.run import computing

BLOCKS = (
    *("distributed_strategy.compile=blocks", "data.attention=dense", "data.buckets=[128,256]"),
    *("exp_manager.fail_on_recompile=True", "exp_manager.export_hf=False", "trainer.val_check_interval=2"),
)


def train(project: Project, caplog: pytest.LogCaptureFixture, *overrides: str) -> tuple[int, int]:
    """As in a process of its own: graphs that the run compiled, and those that its manifest does not have."""
    torch._dynamo.reset()
    caplog.clear()
    assert project.train(*BLOCKS, *overrides) == 0, caplog.text
    found = re.search(r"graphs: (\d+) compiled, (\d+) outside the manifest", caplog.text)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


@pytest.mark.full
def test_a_dry_run_compiles_every_graph_of_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The graphs that every backend gets; ``aot_eager`` runs them op by op, where inductor compiles C++."""
    monkeypatch.setitem(computing.COMPILED_DEVICES, "cpu", "aot_eager")
    monkeypatch.setattr(compiled, "require_compiler", lambda: None)
    caplog.set_level(logging.INFO)
    project = Project.create(tmp_path)
    manifests = f"{tmp_path}/experiments"
    with monkeypatch.context() as dry:
        dry.setenv("COMPILE", "1")
        train(project, caplog, "trainer.max_steps=4", f"exp_manager.exp_dir={manifests}")
    totals = re.search(r"Total graphs: (\d+)", capsys.readouterr().out)
    (manifest,) = tmp_path.rglob("compile/*.json")
    listed = json.loads(manifest.read_text())
    assert totals is not None and len(listed["graphs"]) == int(totals[1]) > 0
    assert {graph["name"].partition(": ")[2] for graph in listed["graphs"]} == {
        *("embedding", "layer", "head", "loss")
    }
    one, outside = train(project, caplog, "trainer.max_steps=2", f"exp_manager.exp_dir={manifests}")
    assert one > 0 and outside == 0
    resumed, outside = train(project, caplog, "trainer.max_steps=4", f"exp_manager.exp_dir={manifests}")
    assert resumed > 0 and outside == 0
    # The same rows with another loss: told by its first graph that is not listed.
    torch._dynamo.reset()
    capsys.readouterr()
    hinge = ("model_alignment_strategy.dpo.loss_type=hinge", "trainer.max_steps=2")
    assert project.train(*BLOCKS, *hinge, f"exp_manager.exp_dir={manifests}/hinge") == 0, "no manifest there"
    (tmp_path / "experiments/hinge/compile").mkdir()
    copied = tmp_path / "experiments/hinge/compile" / manifest.name
    copied.write_bytes(manifest.read_bytes())
    torch._dynamo.reset()
    more = ("exp_manager.resume_if_exists=False", f"exp_manager.exp_dir={manifests}/hinge")
    assert project.train(*BLOCKS, *hinge, *more) == 1
    said = capsys.readouterr().err
    assert "needed 1 graph(s) that COMPILE=1 has not compiled ahead (1 of training step: loss)" in said
    # Rows of another length are named before the first step.
    torch._dynamo.reset()
    other = ("data.buckets=[192,256]", "exp_manager.name=other", f"exp_manager.exp_dir={manifests}")
    manifest.rename(manifest.with_name(manifest.name.replace("run", "other")))
    assert project.train(*BLOCKS, *other, "trainer.max_steps=2") == 1
    assert "lacks graphs of this run's rows" in capsys.readouterr().err
