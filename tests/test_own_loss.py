"""A loss of one's own through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_fixture import Project, scalars, write_labelled

OWN = """
from torch import nn

class Margin(nn.Module):
    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def forward(self, policy, reference):
        chosen = self.beta * (policy.chosen_logps - reference.chosen_logps)
        rejected = self.beta * (policy.rejected_logps - reference.rejected_logps)
        return -nn.functional.logsigmoid(chosen - rejected), chosen, rejected
"""


def test_a_copy_of_dpo_trains_as_dpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project.create(tmp_path)
    (tmp_path / "copy_of_dpo.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    short = ("trainer.max_steps=3", "data.val_dir=null")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/dpo", *short) == 0
    key = "model_alignment_strategy.loss"
    own = (f"{key}=copy_of_dpo.Margin", f"{key}_settings={{beta: 0.3}}")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/own", *short, *own) == 0
    want, got = (scalars(project.only_run(name)) for name in ("dpo", "own"))
    for tag in ("reduced_train_loss", "rewards/margins", "gradient_norm"):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in want[tag]])
    assert "dpo.kl_beta" in capsys.readouterr().err  # it has no effect, which is noticed

    assert project.train(*short, own[0]) == 1
    message = capsys.readouterr().err
    assert "copy_of_dpo.Margin cannot be made with loss_settings {}" in message
    assert "Traceback" not in message


OWN_KTO = """
import torch
from nxdt_align.losses import LossOutput

class Kahneman:
    couples_examples = True

    def __init__(self, beta):
        self.beta = beta

    def __call__(self, policy, reference):
        ratio = policy.completion_logps - reference.completion_logps
        mismatched = (policy.mismatched_logps - reference.mismatched_logps)[policy.valid[0::2]].detach()
        kl = mismatched.mean().clamp(min=0)
        signed = torch.where(policy.labels, ratio - kl, kl - ratio)
        return LossOutput(torch.sigmoid(-self.beta * signed), extras={"kl": kl.expand(ratio.shape)})
"""


def test_a_copy_of_kto_trains_as_kto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project.create(tmp_path)
    write_labelled(tmp_path)
    (tmp_path / "copy_of_kto.py").write_text(OWN_KTO)
    monkeypatch.chdir(tmp_path)
    common = ("~model_alignment_strategy.dpo", "model_alignment_strategy.kto.beta=0.3", "trainer.max_steps=3")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/kto", *common) == 0
    key = "model_alignment_strategy.loss"
    own = (f"{key}=copy_of_kto.Kahneman", f"{key}_settings={{beta: 0.3}}")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/own", *common, *own) == 0
    want, got = (scalars(project.only_run(name)) for name in ("kto", "own"))
    for tag in ("reduced_train_loss", "kl", "gradient_norm"):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in want[tag]])
    assert "rewards/chosen" in want and "rewards/chosen" not in got
