"""Two processes, as torchrun starts them, against one: the same curves and the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from damage import flip
from training_fixture import Project, final_weights, scalars

from nxdt_align.weights.hf import HFFolder


@pytest.mark.full
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The loss is a mean over the global batch, the gradient a sum over ranks: 2e-5 on every curve,
    5e-5 on every weight after 8 AdamW steps. The reference pass, validation and resume run too."""
    project = Project.create(tmp_path)
    assert project.train(f"exp_manager.exp_dir={tmp_path}/one") == 0
    two = (f"exp_manager.exp_dir={tmp_path}/two", "trainer.devices=2", "exp_manager.seconds_to_sleep=0.1")
    said = project.train_spread(2, *two, "trainer.max_steps=4")
    assert "sync_dist" not in said, "no advice of Lightning's to reduce what is a mean over all ranks"
    project.train_spread(2, *two)
    got, want = scalars(project.only_run("two")), scalars(project.only_run("one"))
    assert [step for step, _ in got["reduced_train_loss"]] == list(range(1, 9))
    for tag in ("reduced_train_loss", "rewards/margins", "logps/chosen", "gradient_norm", "val_loss", "lr"):
        wanted = [value for _, value in want[tag]]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, abs=2e-5, rel=2e-5), tag
    weights = final_weights(project.only_run("one"))
    for name, tensor in final_weights(project.only_run("two")).items():
        assert float((tensor - weights[name]).abs().max()) <= 5e-5, name


def test_a_run_goes_on_in_other_layouts(tmp_path: Path) -> None:
    """Two processes with their optimizer's state divided, checkpoints in the background; then one; then
    two again: the curves and weights of one process throughout, and an export that is its checkpoint."""
    project = Project.create(tmp_path, pairs=24)
    assert project.train(f"exp_manager.exp_dir={tmp_path}/one", "data.packing=none") == 0
    background = ("data.packing=none", "exp_manager.async_checkpointing=True")
    where = (f"exp_manager.exp_dir={tmp_path}/moved", *background)
    two = (*where, "trainer.devices=2", "exp_manager.seconds_to_sleep=0.1")
    project.train_spread(2, *two, "distributed_strategy.zero1=True", "trainer.max_steps=3")
    (folder,) = (project.only_run("moved") / "checkpoints").iterdir()
    shards = {f.name: f.stat().st_size for f in (folder / "tensors").glob("*.distcp")}
    assert len(shards) == 2 and max(shards.values()) < 1.2 * min(shards.values())
    assert project.train(*where, "trainer.max_steps=5") == 0
    project.train_spread(2, *two, "distributed_strategy.zero1=True")
    got, want = scalars(project.only_run("moved")), scalars(project.only_run("one"))
    assert [step for step, _ in got["reduced_train_loss"]] == list(range(1, 9))
    for tag in (
        "reduced_train_loss",
        "rewards/margins",
        "gradient_norm",
        "val_loss",
        "lr",
        "consumed_samples",
    ):
        wanted = [value for _, value in want[tag]]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, abs=2e-5, rel=2e-5), tag
    weights, moved = final_weights(project.only_run("one")), final_weights(project.only_run("moved"))
    exported = HFFolder(project.only_run("moved") / "hf_export")
    for name, tensor in moved.items():
        assert float((tensor - weights[name]).abs().max()) <= 5e-5, name
        assert exported.read(name).equal(tensor), name


@pytest.mark.full
def test_all_ranks_pass_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    """A flipped bit in the second rank's file: both go on from the step before, bit for bit; where there is
    none, one of them says so."""
    project = Project.create(tmp_path)
    two = ("trainer.devices=2", "exp_manager.seconds_to_sleep=0.1", "distributed_strategy.zero1=True")
    keep = "exp_manager.checkpoint_callback_params.save_top_k=-1"
    moved, straight = (f"exp_manager.exp_dir={tmp_path}/{name}" for name in ("moved", "straight"))
    project.train_spread(2, *two, straight, "trainer.max_steps=6")
    project.train_spread(2, *two, moved, keep, "trainer.max_steps=4")
    checkpoints = project.only_run("moved") / "checkpoints"
    (newest,) = checkpoints.glob("*4-*0")
    flip(newest / "tensors" / "__1_0.distcp")
    said = project.train_spread(2, *two, moved, "trainer.max_steps=6")
    assert said.count(f"not resumed from: checkpoint {newest} is damaged: tensors/__1_0.distcp") == 1
    assert said.count("resuming from step 2 instead") == 1
    shutil.rmtree(newest)
    weights = final_weights(project.only_run("straight"))
    for name, tensor in final_weights(project.only_run("moved")).items():
        assert torch.equal(tensor, weights[name]), name

    (last,) = (f for f in checkpoints.iterdir() if f.is_dir())
    flip(last / "tensors" / "__1_0.distcp")
    with pytest.raises(AssertionError) as failed:
        project.train_spread(2, *two, moved)
    assert str(failed.value).count("no checkpoint of this run in") == 1
    assert project.only_run("moved") == checkpoints.parent
