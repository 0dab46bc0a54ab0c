"""The same configuration through both engines: the NxD engine in CPU mode on two tensor-parallel ranks or two
pipeline stages, stopped and gone on with, against the native engine in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from nxd_fixture import NXD, SPREAD, require_nxd
from training_fixture import Project, scalars, train_sh

from nxdt_align.weights.hf import HFFolder

pytestmark = pytest.mark.nxd
STEPS = 20


@pytest.mark.parametrize("spread", SPREAD)
def test_the_loss_curves_are_the_same(repo: Path, tmp_path: Path, spread: str) -> None:
    """20 steps of DPO with clipping, a schedule, the reference pass and validation: 1e-5 on the loss, 1e-4
    on the gradients' norm and on every exported weight."""
    require_nxd()
    project = Project.create(tmp_path)
    common = (f"trainer.max_steps={STEPS}", "precision.type=fp32", "exp_manager.export_hf=True")
    common += ("model.optim.lr=1e-3",)
    native = (*common, "distributed_strategy.engine=native")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/native", *native) == 0
    nxd = (f"exp_manager.exp_dir={tmp_path}/nxd", *common, *NXD, *SPREAD[spread])
    train_sh(repo, project, *nxd, "trainer.max_steps=8", "exp_manager.export_hf=False")
    said = train_sh(repo, project, *nxd)
    assert "resuming from this run's own checkpoint" in said

    got, want = scalars(project.only_run("nxd")), scalars(project.only_run("native"))
    for tag, tolerance in (("reduced_train_loss", 1e-5), ("val_loss", 1e-5), ("gradient_norm", 1e-4)):
        wanted = [value for _, value in want[tag]]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, abs=tolerance, rel=tolerance), tag
    assert [step for step, _ in got["reduced_train_loss"]] == list(range(1, STEPS + 1))
    exported, other = (HFFolder(project.only_run(run) / "hf_export") for run in ("nxd", "native"))
    assert exported.names() == other.names()
    for name in other.names():
        assert float((exported.read(name) - other.read(name)).abs().max()) <= 1e-4, name


def test_the_reference_has_a_dtype_of_its_own(repo: Path, tmp_path: Path) -> None:
    """A bf16 reference beside an fp32 policy: margins that are not 0 at the first step, by bf16's rounding;
    with the weights of the policy's start, whether they are asked before training or during it."""
    require_nxd()
    project = Project.create(tmp_path)
    common = (*NXD, "trainer.devices=1", "trainer.max_steps=2", "precision.type=fp32")
    margins = []
    for before in (True, False):
        where = f"exp_manager.exp_dir={tmp_path}/{before}"
        chosen = (
            "model_alignment_strategy.reference_dtype=bf16",
            f"model_alignment_strategy.dpo.precompute_ref_log_probs={before}",
        )
        said = train_sh(repo, project, where, *common, *chosen)
        assert "reference_dtype" not in said, "no notice of a key without effect"
        margins.append(scalars(project.only_run(str(before)))["rewards/margins"][0][1])
    assert all(1e-5 < abs(margin) < 0.05 for margin in margins)
    assert margins[0] == pytest.approx(margins[1], abs=5e-3)
