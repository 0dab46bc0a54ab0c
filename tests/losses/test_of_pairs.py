"""``ResponseLogps.of_pairs``: any loss of pairs from two arrays, in two lines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from nxdt_align.batch import SlotRole
from nxdt_align.config.alignment import CPOConfig, DPOConfig, ORPOConfig
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.losses import CPOLoss, DPOLoss, Loss, ORPOLoss, ResponseLogps, SimPOLoss

of_pairs = ResponseLogps.of_pairs


def test_dpo_by_hand() -> None:
    """Margin (-12 + 13) - (-15 + 14) = 2, beta 0.5: ln(1 + e^-1); the second pair's is 0: ln 2."""
    loss = DPOLoss(DPOConfig(kl_beta=0.5))
    output = loss(of_pairs([-12.0, -3.0], [-15.0, -4.0]), of_pairs([-13.0, -3.0], [-14.0, -4.0]))
    assert output.losses.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log(2)])
    assert output.chosen_rewards is not None and output.chosen_rewards.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "tensor"])
@pytest.mark.parametrize("loss", [*FORMS, "orpo", "cpo", "simpo"])
def test_every_loss_of_pairs(loss: str, kind: Any) -> None:
    made = {"orpo": ORPOLoss, "cpo": CPOLoss, "simpo": SimPOLoss}.get(
        loss, lambda: DPOLoss(DPOConfig(kl_beta=0.1, loss_type=loss))
    )()
    chosen, rejected = kind([-12.0, -7.5, -3.0]), kind([-15.0, -7.0, -4.0])
    counts = kind([6.0, 3.0, 2.0])
    reference = of_pairs(kind([-13.0, -7.0, -3.5]), kind([-14.0, -7.5, -4.5]), counts, counts)
    losses = made(of_pairs(chosen, rejected, counts, counts), reference).losses
    assert losses.shape == (3,) and losses.isfinite().all()


def test_a_tensor_keeps_its_gradient() -> None:
    """d/dc -ln sigmoid(beta c) at 0 is -beta / 2."""
    chosen = torch.zeros(2, requires_grad=True)
    loss = DPOLoss(DPOConfig(kl_beta=0.4, reference_free=True))
    loss(of_pairs(chosen, torch.zeros(2)), None).losses.sum().backward()
    assert chosen.grad is not None and chosen.grad.tolist() == pytest.approx([-0.2, -0.2])


def test_slots_are_those_of_a_batch() -> None:
    pairs = of_pairs([1.0, 2.0], [3.0, 4.0])
    assert pairs.sums.tolist() == [1.0, 3.0, 2.0, 4.0]
    assert pairs.roles.tolist() == [SlotRole.CHOSEN, SlotRole.REJECTED] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([1.0], [1.0, 2.0]),
            r"one shape \(P,\), one value per pair, but have: chosen \(1,\), rejected \(2,\)",
        ),
        (([[1.0]], [[1.0]]), r"but have: chosen \(1, 1\), rejected \(1, 1\)"),
        (([1.0], [1.0], [2.0]), "chosen_counts and rejected_counts: give both, or neither"),
        (([1.0], [1.0], [2.0], [0.0]), "counts are tokens per response, at least 1, but one is 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_pairs(*arguments)


@pytest.mark.parametrize(
    "loss",
    [
        *(DPOLoss(DPOConfig(loss_type=name)) for name in FORMS if FORMS[name].normalised),
        DPOLoss(DPOConfig(length_normalization=True)),
        DPOLoss(DPOConfig(nll_scale=1.0)),
        CPOLoss(CPOConfig()),
        ORPOLoss(ORPOConfig()),
        SimPOLoss(),
    ],
    ids=repr,
)
def test_a_loss_that_divides_by_the_length_says_that_it_got_none(loss: Loss) -> None:
    pairs = of_pairs([-2.0], [-3.0])
    with pytest.raises(
        ValueError, match=r"divides by the responses' tokens.*chosen_counts and rejected_counts"
    ):
        loss(pairs, pairs)
    with pytest.raises(ValueError, match="counts are not known"):
        _ = pairs.with_sums(pairs.sums).chosen_counts


def test_a_reference_of_other_pairs_is_not_broadcast() -> None:
    with pytest.raises(ValueError, match="of the policy's 4 responses, but got 2"):
        DPOLoss()(of_pairs([-2.0, -1.0], [-3.0, -2.0]), of_pairs([-2.0], [-4.0]))
