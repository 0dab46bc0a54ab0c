"""The public API: typed, documented, lazy, and enough for a whole run from a script."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from training_fixture import Project, scalars

import nxdt_align as na
from nxdt_align.config.faults import ConfigError


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.create(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def start(project: Project) -> Path:
    """Weights to start from, which one step of a run leaves."""
    result = na.train(config(project, "trainer.max_steps=1", "exp_manager.name=start"))
    assert result.export is not None
    return result.export


def config(project: Project, *overrides: str) -> Any:
    return na.load_config(project.root / "conf" / "run.yaml", *overrides)


def test_every_name_is_there_and_documented() -> None:
    assert 10 <= len(na.__all__) <= 18
    for name in set(na.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(na, name)), name
    assert set(na.__all__) <= set(dir(na))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        na.trian  # noqa: B018


def test_the_package_imports_nothing_before_it_is_asked() -> None:
    code = "import sys, nxdt_align; print([m for m in ('torch', 'hydra', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_from_a_script(project: Project, start: Path) -> None:
    """What the command line does, with its results at hand; the policy's log-probabilities are training's."""

    class Count(Callback):
        steps = 0

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            Count.steps += 1

    given = config(project, "trainer.max_steps=4", f"exp_manager.resume_from_checkpoint={start}")
    result = na.train(given, callbacks=[Count()])
    assert Count.steps == result.step == 4
    assert result.folder is not None and result.checkpoint is not None and result.export is not None
    assert result.checkpoint.parent == result.folder / "checkpoints" and result.export.parent == result.folder
    logged = scalars(result.folder)["reduced_train_loss"][-1][1]
    assert result.metrics["reduced_train_loss"] == pytest.approx(logged, rel=1e-6)
    pairs = na.load_pairs(project.root / "val.jsonl", project.root / "tokenizer", seq_length=128)
    policy, reference = na.load_policy(result.folder), na.load_policy(start)
    loss = na.DPOLoss(given.model_alignment_strategy.dpo)
    losses = loss(policy.logps(pairs), reference.logps(pairs)).losses
    validated = scalars(result.folder)["val_loss"][-1]
    assert validated[0] == 3, "the last validation is one step before the end"
    assert losses.shape == (6,) and abs(float(losses.mean()) - validated[1]) < 0.1
    for other in (result.checkpoint, result.export):
        assert torch.equal(na.load_policy(other).logps(pairs).sums, policy.logps(pairs).sums)


def test_the_batch_size_of_log_probabilities_changes_nothing(project: Project, start: Path) -> None:
    policy = na.load_policy(start)
    pairs = na.load_pairs(project.root / "val.jsonl", project.root / "tokenizer", seq_length=128)
    one, all_ = policy.logps(pairs, batch_size=1), policy.logps(pairs, batch_size=99)
    torch.testing.assert_close(one.sums, all_.sums, rtol=1e-6, atol=1e-5)
    assert torch.equal(one.counts, all_.counts)


def test_a_loss_of_the_scripts_own(project: Project, start: Path) -> None:
    """In torchtune's signature; another setting of it is another run."""

    class Squared(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, policy: Any, reference: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            margin = policy.chosen_logps - policy.rejected_logps
            return (self.scale - margin) ** 2, margin.detach(), -margin.detach()

    given = config(project, "trainer.max_steps=1", f"exp_manager.resume_from_checkpoint={start}")
    folders = {na.train(given, loss=Squared(scale)).folder for scale in (1.0, 2.0, 2.0)}
    assert len(folders) == 2
    with pytest.raises(
        ValueError, match=r"model_alignment_strategy.loss: .*must be called as \(policy, reference\)"
    ):
        na.train(given, loss=lambda policy: policy)


def test_what_is_wrong_is_raised_as_a_value_error(project: Project, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean trainer\.max_steps"):
        config(project, "trainer.max_stepz=3")
    with pytest.raises(ConfigError, match="2 faults"):
        na.train(
            config(project, "data.micro_batch_size=3", "data.train_dir=/no/such.jsonl", "data.packing=none")
        )
    with pytest.raises(ValueError, match="nothing does not exist"):
        na.load_policy(tmp_path / "nothing")
    (tmp_path / "run_identity.json").write_text("{}")
    with pytest.raises(ValueError, match="has no whole checkpoint: name another run"):
        na.load_policy(tmp_path)
    with pytest.raises(ValueError, match=r"nothing\.jsonl"):
        na.load_pairs(tmp_path / "nothing.jsonl", project.root / "tokenizer")


def test_a_tokenizer_of_another_model_is_named(project: Project, start: Path) -> None:
    pairs = na.load_pairs(project.root / "val.jsonl", project.root / "tokenizer", seq_length=128)
    policy = na.load_policy(start)
    object.__setattr__(policy.config, "vocab_size", 10)
    with pytest.raises(
        ValueError, match="vocabulary of 10: the tokenizer and the model do not belong together"
    ):
        policy.logps(pairs)
