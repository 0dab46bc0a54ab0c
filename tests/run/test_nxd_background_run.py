"""exp_manager.async_checkpointing with engine nxd, through train.sh, in NxD's CPU mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nxd_fixture import NXD, SPREAD, require_nxd
from training_fixture import Project, train_sh

from nxdt_align.engines.nxd.checkpoint import checkpoint_step
from nxdt_align.weights.hf import HFFolder

pytestmark = pytest.mark.nxd


def test_a_run_goes_on_as_after_saves_at_once(repo: Path, tmp_path: Path) -> None:
    """Six steps, at once and with saves in the background and a stop after four: every exported weight bit
    for bit, and of each run the last checkpoint alone is left."""
    require_nxd()
    project = Project.create(tmp_path)
    common = (*NXD, *SPREAD["tensor"], "exp_manager.export_hf=True", "exp_manager.load_xser=True")
    train_sh(repo, project, f"exp_manager.exp_dir={tmp_path}/whole", *common, "trainer.max_steps=6")
    behind = (f"exp_manager.exp_dir={tmp_path}/behind", *common, "exp_manager.async_checkpointing=True")
    said = train_sh(repo, project, *behind, "trainer.max_steps=4")
    assert "keys without effect" not in said
    said = train_sh(repo, project, *behind, "trainer.max_steps=6")
    assert "resuming from this run's own checkpoint" in said
    assert "exp_manager.load_xser: is True, but" in said and "holds plain files" in said
    runs = [project.only_run(name) for name in ("whole", "behind")]
    for run in runs:
        left = [f for f in (run / "checkpoints").iterdir() if f.is_dir()]
        assert [checkpoint_step(f) for f in left] == [6], left
    wanted, found = (HFFolder(run / "hf_export") for run in runs)
    assert found.names() == wanted.names()
    for name in wanted.names():
        assert torch.equal(found.read(name), wanted.read(name)), name
