"""A custom loss through the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from layouts import ATTENTIONS, GRADIENT_TOLERANCE, LAYOUTS, LOSS_TOLERANCE, dataset, engine
from oracle import assert_gradients_close, gradients, pair_logps, plain_model, random_examples
from torch import Tensor
from training_fixture import Project, scalars, write_labelled

from nxdt_align.cli import main
from nxdt_align.data.packing import Layout
from nxdt_align.data.tokenize import Example
from nxdt_align.losses.custom import load_loss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.decoder import Decoder

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
    assert "copy_of_dpo.Margin cannot be created with loss_settings {}" in message
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


OF_LOGITS = """
from nxdt_align.losses import LossOutput

class Flat:
    needs_logits = True

    def __init__(self, weight=0.5):
        self.weight = weight

    def __call__(self, policy, reference):
        penalties = []
        for logits, counts in (
            (policy.chosen_logits, policy.chosen_counts), (policy.rejected_logits, policy.rejected_counts)
        ):
            is_token = (logits != 0).any(-1)
            penalties.append((logits.logsumexp(-1).square() * is_token).sum(1) / counts)
        losses = self.weight * (penalties[0] + 2 * penalties[1]) - policy.chosen_logps / policy.chosen_counts
        return LossOutput(losses)
"""


def flat_loss(model: Decoder, examples: Sequence[Example]) -> Tensor:
    """The same, one response at a time."""
    losses = []
    for example in examples:
        penalties = []
        for response in example.responses:
            ids = torch.tensor([*example.prompt, *response])[None]
            logits = model.logits(model(ids, torch.arange(ids.shape[1])[None], None))[0]
            penalties.append(logits[len(example.prompt) - 1 : -1].logsumexp(-1).square().mean())
        likelihood = pair_logps(model, example)[0] / len(example.responses[0])
        losses.append(0.5 * (penalties[0] + 2 * penalties[1]) - likelihood)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("micro", [1, 3])
def test_one_that_reads_logits(
    layout: Layout, attention: str, micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flat_logits.py").write_text(OF_LOGITS)
    monkeypatch.chdir(tmp_path)
    examples = random_examples(7, seed=5)
    policy = engine(attention=attention)
    batches = dataset(examples, layout, micro)[tuple(range(7))]
    batches = [b.with_reference(torch.zeros_like(b.slot_valid, dtype=torch.float32)) for b in batches]
    objective = GlobalMeanObjective(load_loss("flat_logits.Flat"), token_statistics=True)
    evaluated, output = policy.evaluate(batches, objective), policy.step(batches, objective)
    model = plain_model(0)
    wanted = flat_loss(model, examples.examples)
    for loss in (evaluated.loss, output.loss):
        assert float(loss) == pytest.approx(float(wanted.detach()), rel=LOSS_TOLERANCE)
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)


@pytest.mark.full
def test_one_that_reads_logits_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process, in two that share weights and data, and refused where the vocabulary is divided."""
    project = Project.create(tmp_path)
    (tmp_path / "flat_logits_too.py").write_text(OF_LOGITS)
    monkeypatch.chdir(tmp_path)
    own = ("model_alignment_strategy.loss=flat_logits_too.Flat", "trainer.max_steps=3")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/own", *own) == 0
    losses = [value for _, value in scalars(project.only_run("own"))["reduced_train_loss"]]
    # Fresh weights: all tokens are about as likely, and a response's logsumexp is ln(vocabulary).
    likelihood = math.log(json.loads((tmp_path / "config.json").read_text())["vocab_size"])
    assert losses == pytest.approx([1.5 * likelihood**2 + likelihood] * 3, rel=0.05)
    divided = ("trainer.devices=2", "distributed_strategy.fsdp=full", "exp_manager.seconds_to_sleep=0.1")
    project.train_spread(2, f"exp_manager.exp_dir={tmp_path}/divided", *own, *divided)
    curves = scalars(project.only_run("own")), scalars(project.only_run("divided"))
    for tag in ("reduced_train_loss", "gradient_norm", "val_loss"):
        want, got = ([value for _, value in curve[tag]] for curve in curves)
        assert got == pytest.approx(want, rel=2e-5), tag
    capsys.readouterr()
    two = ("trainer.devices=2", "distributed_strategy.tensor_model_parallel_size=2")
    assert main(["plan", *project.arguments(*own, *two)[1:]]) == 1
    message = capsys.readouterr().err
    assert "flat_logits_too.Flat declares needs_logits, but tensor_model_parallel_size is above 1" in message
    assert "engine native" in message and "Traceback" not in message
