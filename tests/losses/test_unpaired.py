"""KTO by hand and against TRL's own code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl_losses import TOLERANCE, accelerator, takes_log_probs

from nxdt_align.config.alignment import KTOConfig
from nxdt_align.losses.kto import KTOLoss
from nxdt_align.losses.metrics import finish
from nxdt_align.losses.types import ResponseLogps

Slots = Callable[..., ResponseLogps]


def batch(slots: Slots, sums: Tensor, labels: Tensor) -> ResponseLogps:
    return replace(slots(sums), desirable=labels.repeat_interleave(2))


def test_kto_by_hand(slots: Slots) -> None:
    """Ratio 2, kl 1, beta 1: 1 - sigmoid(1) = 0.268941 if desirable; -> 0.5 * 0.731059 if not. An empty
    place, far off, counts in neither."""
    labels = torch.tensor([True, False, True])
    policy = batch(slots, torch.tensor([2.0, 1.0, 2.0, 1.0, 9.0, 99.0]), labels)
    policy = replace(policy, valid=torch.tensor([True] * 4 + [False] * 2))
    output = KTOLoss(KTOConfig(beta=1.0, undesirable_weight=0.5))(policy, slots(torch.zeros(6)))
    assert output.losses[:2].tolist() == pytest.approx([0.268941, 0.5 * 0.731059], abs=1e-6)
    assert output.extras["kl"][0].item() == 1.0


def test_the_divergence_is_at_least_zero_and_takes_no_gradient(slots: Slots) -> None:
    sums = torch.tensor([1.0, -5.0], requires_grad=True)
    output = KTOLoss(KTOConfig(beta=1.0))(batch(slots, sums, torch.tensor([True])), slots(torch.zeros(2)))
    assert output.extras["kl"].item() == 0.0
    output.losses.sum().backward()
    assert sums.grad is not None and sums.grad[0] != 0 and sums.grad[1] == 0


class TwoOutputs(nn.Module):
    """Log-probs of completions, or of the mismatched ones, told apart by their tokens."""

    def __init__(self, main: Tensor, mismatched: Tensor) -> None:
        super().__init__()
        self.outputs = (main, mismatched)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        logps = self.outputs[int(input_ids[0, 0])]
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros)


def trl_kto(
    sums: Tensor, reference: Tensor, labels: Tensor, loss: KTOLoss
) -> tuple[Tensor, dict[str, float]]:
    """(2P,) interleaved completions and mismatched ones, each of one token."""
    from trl.trainer.kto_trainer import KTOTrainer

    trainer = KTOTrainer.__new__(KTOTrainer)
    trainer.model = TwoOutputs(sums[0::2, None], sums[1::2, None])
    trainer.accelerator = accelerator()
    trainer.aux_loss_enabled, trainer.calculate_KL, trainer.precompute_ref_logps = False, True, True
    trainer.loss_type, trainer.beta = "kto", loss.config.beta
    trainer.desirable_weight = loss.config.desirable_weight
    trainer.undesirable_weight = loss.config.undesirable_weight
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    ids = torch.zeros(len(labels), 2, dtype=torch.long)
    ones = torch.ones_like(ids)
    inputs = {
        "input_ids": ids,
        "KL_input_ids": ones,
        "attention_mask": ones,
        "KL_attention_mask": ones,
        "completion_mask": ones,
        "KL_completion_mask": ones,
        "label": labels,
        "ref_logps": reference[0::2],
        "ref_KL_logps": reference[1::2],
    }
    value = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    return value, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@takes_log_probs
@pytest.mark.parametrize("scale", [3.0, 1e4])
@pytest.mark.parametrize(
    "loss", [KTOLoss(), KTOLoss(KTOConfig(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7))]
)
def test_kto_equals_trl(slots: Slots, loss: KTOLoss, scale: float) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        sums = -torch.rand(14, generator=generator) * scale
        reference = -torch.rand(14, generator=generator) * scale
        labels = torch.rand(7, generator=generator) > 0.4
        labels[0], labels[1] = True, False
        theirs_in, ours_in = sums.clone().requires_grad_(), sums.clone().requires_grad_()
        theirs, metrics = trl_kto(theirs_in, reference, labels, loss)
        output = loss(batch(slots, ours_in, labels), slots(reference))
        ours = output.losses.mean()
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        ours.backward()
        theirs.backward()
        assert theirs_in.grad is not None
        torch.testing.assert_close(ours_in.grad, theirs_in.grad, **TOLERANCE)
        means = {
            name: float(v) for name, v in finish({n: e.mean() for n, e in output.extras.items()}).items()
        }
        assert means == pytest.approx({name: metrics[name] for name in means}, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kto_is_finite_at_the_extremes(slots: Slots, dtype: torch.dtype) -> None:
    for ratio in (-1e4, 1e4):
        for kl in (-1e4, 1e4):
            leaf = torch.tensor([ratio, kl, ratio, kl], dtype=dtype, requires_grad=True)
            policy = batch(slots, leaf, torch.tensor([True, False]))
            losses = KTOLoss()(policy, slots(torch.zeros(4))).losses
            losses.sum().backward()
            assert losses.isfinite().all() and leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "kto.beta: must be above 0, but is 0.0"),
        ({"desirable_weight": -1.0}, "kto.desirable_weight: must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KTOLoss(KTOConfig(**settings))
