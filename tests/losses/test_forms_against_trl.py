"""Every form of DPO, CPO and SimPO against TRL 1.16's own code: value and gradient to 1e-6 in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_losses import TOLERANCE, accelerator, interleave, takes_log_probs, trl_dpo

from nxdt_align.batch import Batch
from nxdt_align.config.alignment import CPOConfig, DPOConfig, SimPOConfig
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.losses.cpo import CPOLoss, SimPOLoss
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.types import LossOutput, ResponseLogps

Slots = Callable[..., ResponseLogps]

# Ours (beside beta) -> TRL's attributes.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: ({"loss_type": (name,)}, {"loss_types": [name]}) for name in FORMS},
    "exo_pair": ({"loss_type": ("exo_pair",)}, {"loss_types": ["exo_pair"], "label_smoothing": 1e-3}),
    "bco_pair": (
        {"loss_type": ("bco_pair",), "bco_reward_shift": "none"},
        {"loss_types": ["bco_pair"]},
    ),
}
for _name in ("robust", "exo_pair", "aot", "aot_unpaired"):
    _smoothing = {"label_smoothing": 0.2}
    SAME[f"{_name}, smoothed"] = (
        {"loss_type": (_name,), **_smoothing},
        {"loss_types": [_name], **_smoothing},
    )
DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    *({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a} for a in (0.5, 0.1, 2.0, 1.0)),
]
for _name in (name for name, form in FORMS.items() if form.of_difference):
    for _divergence in DIVERGENCES:
        _smoothing = {"label_smoothing": 1e-3} if _name == "exo_pair" else {}
        SAME[f"{_name}, {' '.join(map(str, _divergence.values()))}"] = (
            {"loss_type": (_name,), **_divergence},
            {"loss_types": [_name], **_divergence, **_smoothing},
        )
SAME["three, weighted"] = (
    {
        "loss_type": ("sigmoid", "bco_pair", "ipo"),
        "loss_weights": (0.8, 0.2, 1.5),
        "bco_reward_shift": "none",
    },
    {"loss_types": ["sigmoid", "bco_pair", "ipo"], "loss_weights": [0.8, 0.2, 1.5]},
)
PAIRS, WIDTH = 7, 33


def trl_settings(given: dict[str, Any]) -> dict[str, Any]:
    return {"loss_weights": [1.0] * len(given["loss_types"]), **given}


def random_tokens(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(2P, T) token log-probs and mask, all chosen rows first, and (2P,) sums of a reference near them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH + 1, (2 * PAIRS,), generator=generator)
    mask = (torch.arange(WIDTH) < lengths[:, None]).float()
    tokens = -torch.rand(2 * PAIRS, WIDTH, generator=generator) * mask * 3
    return tokens, mask, tokens.sum(1) + torch.randn(2 * PAIRS, generator=generator) * 2


def both(
    slots: Slots, tokens: Tensor, mask: Tensor, reference: Tensor, beta: float, case: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(theirs, ours, gradient of theirs, gradient of ours)."""
    ours_given, theirs_given = SAME[case]
    theirs_in, ours_in = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    theirs, _ = trl_dpo(theirs_in, mask, reference, beta, **trl_settings(theirs_given))
    counts = interleave(mask.sum(1))
    policy = slots(interleave((ours_in * mask).sum(1)), counts)
    ours = DPOLoss(DPOConfig(kl_beta=beta, **ours_given))(
        policy, slots(interleave(reference), counts)
    ).losses.mean()
    theirs.backward()
    ours.backward()
    assert theirs_in.grad is not None and ours_in.grad is not None
    # TRL's mask is in its model's output, which the test stands in for.
    return theirs, ours, theirs_in.grad * mask, ours_in.grad


@takes_log_probs
@pytest.mark.parametrize("case", SAME)
def test_every_form_equals_trl(slots: Slots, case: str) -> None:
    for seed in range(3):
        for beta in (0.01, 0.1, 1.0):
            theirs, ours, their_gradient, our_gradient = both(slots, *random_tokens(seed), beta, case)
            torch.testing.assert_close(ours, theirs, **TOLERANCE)
            torch.testing.assert_close(our_gradient, their_gradient, **TOLERANCE)


@takes_log_probs
@pytest.mark.parametrize("case", [n for n in SAME if "," not in n and n != "discopop"])
@pytest.mark.parametrize("ratio", [1e4, -1e4])
@pytest.mark.parametrize("length", [1, 4096])
def test_extremes_equal_trl(slots: Slots, case: str, ratio: float, length: int) -> None:
    """Log-ratios to +-1e4, response lengths 1 and 4,096. TRL's discopop is NaN there: exp(-h) times 0."""
    mask = torch.zeros(4, length)
    mask[0], mask[1, 0], mask[2, 0], mask[3] = 1.0, 1.0, 1.0, 1.0
    tokens = -torch.ones(4, length) * mask
    tokens[0, 0], tokens[2, 0] = -2e4, -2e4
    reference = tokens.sum(1) - torch.tensor([ratio, 0.0, 0.0, ratio])
    theirs, ours, their_gradient, our_gradient = both(slots, tokens, mask, reference, 0.1, case)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    torch.testing.assert_close(our_gradient, their_gradient, **TOLERANCE)


@takes_log_probs
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha_equals_trl(make_batch: Callable[..., Batch], alpha: float) -> None:
    """The weights come from the batch: chosen and rejected rows of one pair, one response per row."""
    tokens, mask, _ = random_tokens(4)
    ids = interleave(mask.sum(1)).long().tolist()
    batch = make_batch([[n] for n in ids], PAIRS, 1.0).with_tail_weight(alpha)
    reference_tokens = tokens * 0.9
    theirs_in, ours_in = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    weighted = batch.sum_logps(interleave(reference_tokens * mask)[:, : max(ids)]).flatten()
    half = weighted[0::2], weighted[1::2]
    theirs, _ = trl_dpo(theirs_in, mask, torch.cat(half), 0.1, ld_alpha=alpha)
    policy = ResponseLogps.from_tokens(batch, interleave(ours_in)[:, : max(ids)])
    ours = DPOLoss(DPOConfig(kl_beta=0.1))(policy, policy.with_sums(weighted.detach())).losses.mean()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    theirs.backward()
    ours.backward()
    assert theirs_in.grad is not None
    torch.testing.assert_close(ours_in.grad, theirs_in.grad * mask, **TOLERANCE)


@takes_log_probs
def test_wpo_weighting_equals_trl(slots: Slots) -> None:
    tokens, mask, reference = random_tokens(5)
    collisions = -torch.rand(tokens.shape, generator=torch.Generator().manual_seed(6)) * mask
    theirs_in, ours_in = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    theirs, _ = trl_dpo(theirs_in, mask, reference, 0.1, use_weighting=True, collisions=collisions)
    counts = interleave(mask.sum(1))
    policy = replace(slots(interleave(ours_in.sum(1)), counts), collisions=interleave(collisions.sum(1)))
    loss = DPOLoss(DPOConfig(kl_beta=0.1, use_weighting=True))
    assert loss.needs_collisions
    ours = loss(policy, slots(interleave(reference), counts)).losses.mean()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, **TOLERANCE)


def trl_cpo(chosen: Tensor, rejected: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = CPOTrainer.__new__(CPOTrainer)
    trainer.accelerator, trainer.alpha = accelerator(), 0.0
    for name, value in settings.items():
        setattr(trainer, name, value)
    result: tuple[Tensor, Tensor, Tensor] = trainer.cpo_loss(chosen, rejected)
    return result


def assert_equals_cpo(output: LossOutput, theirs: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.testing.assert_close(output.losses, theirs[0], **TOLERANCE)
    torch.testing.assert_close(output.chosen_rewards, theirs[1])
    torch.testing.assert_close(output.rejected_rewards, theirs[2])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cpo_equals_trl_and_adds_the_likelihood(slots: Slots, smoothing: float, scale: float) -> None:
    """TRL adds cpo_alpha times the mean over tokens; with chosen responses of 5 tokens, so do we."""
    sums = -torch.rand(14, generator=torch.Generator().manual_seed(1)) * scale
    settings = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": smoothing}
    theirs_in, ours_in = sums.clone().requires_grad_(), sums.clone().requires_grad_()
    theirs = trl_cpo(theirs_in[0::2], theirs_in[1::2], **settings)
    policy = slots(ours_in, torch.full((14,), 5.0))
    assert_equals_cpo(
        CPOLoss(CPOConfig(beta=0.1, nll_scale=0.0, label_smoothing=smoothing))(policy, None), theirs
    )
    ours = CPOLoss(CPOConfig(beta=0.1, nll_scale=0.7, label_smoothing=smoothing))(policy, None).losses.mean()
    wanted = theirs[0].mean() + 0.7 * -theirs_in[0::2].sum() / (7 * 5)
    torch.testing.assert_close(ours, wanted, **TOLERANCE)
    ours.backward()
    wanted.backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, **TOLERANCE)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_simpo_equals_trl(slots: Slots, smoothing: float, beta: float) -> None:
    sums = -torch.rand(14, generator=torch.Generator().manual_seed(2)) * 50
    counts = torch.randint(1, 30, (14,), generator=torch.Generator().manual_seed(3)).float()
    settings = {"loss_type": "simpo", "beta": beta, "label_smoothing": smoothing, "simpo_gamma": 0.5}
    theirs_in, ours_in = sums.clone().requires_grad_(), sums.clone().requires_grad_()
    means = theirs_in / counts
    theirs = trl_cpo(means[0::2], means[1::2], **settings)
    output = SimPOLoss(SimPOConfig(beta=beta, gamma=0.5, nll_scale=0.0, label_smoothing=smoothing))(
        slots(ours_in, counts), None
    )
    assert_equals_cpo(output, theirs)
    output.losses.mean().backward()
    theirs[0].mean().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, **TOLERANCE)
