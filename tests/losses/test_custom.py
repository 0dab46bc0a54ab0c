"""A custom loss by dotted path: both signatures, settings, and every way to get it wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from nxdt_align.batch import Batch
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.errors import UserError
from nxdt_align.losses.custom import load_loss
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.types import Loss, ResponseLogps

MODULE = """
import torch
from torch import nn
from nxdt_align.losses import LossOutput

NUMBER = 3

class Torchtune(nn.Module):
    def __init__(self, beta: float = 0.1):
        super().__init__()
        self.beta = beta

    def forward(self, policy_inputs, reference_inputs):
        chosen = self.beta * (policy_inputs.chosen_logps - reference_inputs.chosen_logps)
        rejected = self.beta * (policy_inputs.rejected_logps - reference_inputs.rejected_logps)
        return -nn.functional.logsigmoid(chosen - rejected), chosen, rejected

class Ours:
    needs_reference = False

    def __init__(self, *, margin):
        if margin < 0:
            raise ValueError("margin must not be negative")
        self.margin = margin

    def __call__(self, policy, reference):
        assert reference is None
        return LossOutput(torch.relu(self.margin - (policy.chosen_logps - policy.rejected_logps)))

def function(policy, reference, scale=1.0):
    return LossOutput(-scale * policy.chosen_logps)

def unpaired(policy, reference):
    sign = torch.where(policy.labels, 1.0, -1.0)
    return LossOutput(sign * (policy.completion_logps - policy.mismatched_logps))

def rewarded(policy, reference):
    return LossOutput(-policy.completion_logps, policy.labels.float(), policy.labels.float())

def one_argument(policy):
    return LossOutput(-policy.chosen_logps)

def scalar(policy, reference):
    return LossOutput(-policy.chosen_logps.mean())

def pair(policy, reference):
    return -policy.chosen_logps, policy.chosen_logps

def no_gradient(policy, reference):
    return LossOutput(-policy.chosen_logps.detach())

def reads_logits(policy, reference):
    return LossOutput(-policy.chosen_logits.mean(-1))

def raises(policy, reference):
    raise KeyError("weight")

class Declares:
    needs_logits = True
    def __call__(self, policy, reference):
        return LossOutput(policy.chosen_logits.logsumexp(-1).square().sum(1) / policy.chosen_counts)

class DeclaresInVain:
    needs_logits = True
    def __call__(self, policy, reference):
        return LossOutput(-policy.chosen_logits)

class NotCallable:
    def __init__(self, file):
        open(file, "w").close()

class Loose:
    def __init__(self, file):
        open(file, "w").close()

    def __call__(self, *arguments, **settings):
        return LossOutput(-arguments[0].chosen_logps)

class FailsToStart:
    def __init__(self):
        raise RuntimeError("no weights here")

    def __call__(self, policy, reference):
        return LossOutput(-policy.chosen_logps)

def of_nothing(policy, reference):
    return LossOutput(torch.zeros(2, requires_grad=True))

class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, policy, reference):
        return LossOutput(-self.scale * policy.chosen_logps)

class Buffered(torch.nn.Module):
    needs_reference = False

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))

    def forward(self, policy, reference):
        return LossOutput(-self.scale * policy.chosen_logps)

builtin = torch.nn.functional.logsigmoid

class Tokens:
    needs_reference, normaliser = False, "tokens"
    def __call__(self, policy, reference):
        return LossOutput(-policy.sums)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``own_losses`` in the current folder, imported afresh."""
    import sys

    (tmp_path / "own_losses.py").write_text(dedent(MODULE))
    (tmp_path / "broken_losses.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "script_losses.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    for name in ("own_losses", "broken_losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def value(loss: Loss, make_batch: Callable[..., Batch]) -> torch.Tensor:
    batch = make_batch([[2, 1]], 1.0, 3.0, torch.tensor([[-4.0, -2.0]]))
    return GlobalMeanObjective(loss)(batch, torch.tensor([[-1.0, -1.0, -3.0]]))[0]


def test_torchtunes_signature(make_batch: Callable[..., Batch]) -> None:
    """Chosen -2 against -4, rejected -3 against -2: margin 3, as in DPO's own."""
    loss = load_loss("own_losses.Torchtune", {"beta": 1.0})
    assert isinstance(loss, Loss) and loss.needs_reference and loss.paired
    assert value(loss, make_batch) == value(DPOLoss(DPOConfig(kl_beta=1.0)), make_batch)
    batch = make_batch([[2, 1]], 1.0, 3.0, torch.tensor([[-4.0, -2.0]]))
    metrics = GlobalMeanObjective(loss)(batch, torch.tensor([[-1.0, -1.0, -3.0]]))[1]
    assert metrics["rewards/margins"].item() == 3.0


def test_our_signature_with_settings_and_declarations(make_batch: Callable[..., Batch]) -> None:
    """Margin 1 of log-probs -2 and -3: relu(5 - 1)."""
    loss = load_loss("own_losses.Ours", {"margin": 5.0})
    assert not loss.needs_reference
    assert value(loss, make_batch).item() == 4.0


def test_a_function_takes_its_settings_at_each_call(make_batch: Callable[..., Batch]) -> None:
    assert value(load_loss("own_losses.function", {"scale": 3.0}), make_batch).item() == 6.0


def test_buffers_follow_the_run_to_its_device() -> None:
    """The meta device stands for any that is not the CPU: the two do not mix in a product."""
    loss = load_loss("own_losses.Buffered")
    sums = torch.zeros(4, device="meta")
    policy = ResponseLogps(sums=sums, counts=sums, valid=sums > 0, desirable=sums > 0, roles=sums.long())
    assert loss(policy, None).losses.device.type == "meta"


def test_a_loss_of_single_responses(make_batch: Callable[..., Batch]) -> None:
    loss = load_loss("own_losses.Tokens", examples="response")
    assert loss.normaliser == "tokens" and not loss.paired
    assert math.isclose(value(loss, make_batch).item(), 5 / 3, rel_tol=1e-6)


def test_a_loss_of_labelled_completions(make_batch: Callable[..., Batch]) -> None:
    """Log-probs -2 and -3 of a good completion and a mismatched one: 3 - 2."""
    loss = load_loss("own_losses.unpaired", examples="unpaired")
    assert loss.paired and loss.needs_reference
    assert value(loss, make_batch).item() == 1.0


@pytest.mark.parametrize("name", ["Torchtune", "rewarded"])
def test_rewards_of_labelled_completions_are_refused(name: str) -> None:
    """They would be logged as a chosen and a rejected one's."""
    with pytest.raises(UserError, match=f"own_losses.{name} must return a LossOutput without rewards"):
        load_loss(f"own_losses.{name}", examples="unpaired")


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        (
            "no_such_module.Loss",
            {},
            r"no_such_module \(ModuleNotFoundError: .*looked up in",
        ),
        ("broken_losses.Loss", {}, "cannot import the module broken_losses .*nothing_of_this_name"),
        ("script_losses.Loss", {}, r"cannot import the module script_losses \(SystemExit: 3\)"),
        ("own_losses.FailsToStart", {}, r"cannot be created .* RuntimeError: no weights here; it takes \(\)"),
        ("own_losses.of_nothing", {}, "losses without a gradient; they must depend on the policy's"),
        ("own_losses.Learned", {}, r"has trainable parameters \(scale\), which no optimizer would"),
        ("own_losses.builtin", {}, r"called as \(policy, reference\), but it is .*log_sigmoid"),
        ("own_losses.Missing", {}, "own_losses has no Missing; it has .*Torchtune, Ours, function"),
        ("own_losses.NUMBER", {}, "must be a class or a function, but is int 3"),
        ("own_losses.Ours", {}, r"missing .*'margin'; it takes \(\*, margin\)"),
        ("own_losses.Ours", {"margin": -1}, "margin must not be negative"),
        ("own_losses.Torchtune", {"gamma": 1}, "unexpected keyword argument 'gamma'"),
        ("own_losses.NotCallable", {}, "objects of this class cannot be called"),
        ("own_losses.one_argument", {}, r"called as \(policy, reference\), but its signature is \(policy\)"),
        (
            "own_losses.function",
            {"gamma": 1},
            "must be called as .* with loss_settings",
        ),
        ("own_losses.scalar", {}, r"one loss per example, shape \(2,\) for 2 pairs, but returned shape \(\)"),
        ("own_losses.pair", {}, "but returned a tuple of Tensor, Tensor"),
        ("own_losses.no_gradient", {}, "losses without a gradient"),
        ("own_losses.reads_logits", {}, "a loss read chosen_logits, .* Declare it, or use chosen_logps"),
        ("own_losses.raises", {}, "fails on log-probabilities of 2 pairs: KeyError: 'weight'"),
    ],
)
def test_what_cannot_be_used_is_told(path: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_loss(path, settings)


def test_one_that_declares_logits_is_tried_out_on_some() -> None:
    assert load_loss("own_losses.Declares").needs_logits
    with pytest.raises(UserError, match=r"one loss per example, .* but returned shape \(2, 2, 8\)"):
        load_loss("own_losses.DeclaresInVain")
