"""Forms, divergences and modifiers of DPO where TRL has no counterpart: numbers derived by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nxdt_align.config.alignment import CPOConfig, DPOConfig, ORPOConfig, SimPOConfig
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.config.faults import ConfigError
from nxdt_align.losses.cpo import CPOLoss, SimPOLoss
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.forms import divergence_score, form_function
from nxdt_align.losses.modifiers import wpo_weights
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.losses.types import Loss, ResponseLogps

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
Slots = Callable[..., ResponseLogps]
LN2 = math.log(2)


def loss_of(slots: Slots, loss: Loss, sums: list[float], counts: list[float] | None = None) -> list[float]:
    """Losses of pairs against a reference of all 0, so that sums are log-ratios."""
    counted = None if counts is None else torch.tensor(counts)
    policy = slots(torch.tensor(sums), counted)
    return loss(policy, slots(torch.zeros(len(sums)), counted)).losses.tolist()


def test_conservative_dpo_by_hand(slots: Slots) -> None:
    """h = 1, e = 0.1: 0.9 ln(1 + e^-1) + 0.1 ln(1 + e) = 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262."""
    assert loss_of(slots, DPOLoss(DPOConfig(kl_beta=0.5, label_smoothing=0.1)), [1.0, -1.0]) == pytest.approx(
        [0.413262], abs=1e-6
    )


def test_hinge_takes_gamma_for_beta(slots: Slots) -> None:
    """Margin 1.5: 1 - 0.5 * 1.5 = 0.25 with gamma 0.5; 0 with beta 1."""
    loss = DPOLoss(DPOConfig(kl_beta=1.0, loss_type=("hinge",), gamma=0.5))
    assert loss_of(slots, loss, [1.0, -0.5]) == [0.25]
    assert loss_of(slots, DPOLoss(replace(loss.config, gamma=None)), [1.0, -0.5]) == [0.0]
    output = loss(slots(torch.tensor([1.0, -0.5])), slots(torch.zeros(2)))
    assert output.chosen_rewards is not None and output.chosen_rewards.tolist() == [0.5]


def test_ipo_of_sums_and_of_means(slots: Slots) -> None:
    """Log-ratios 4 of 2 tokens and -3 of 3: means 2 and -1 differ by 3, sums by 7. beta 0.25 wants 2:
    (3 - 2)^2 with means, and (7 - 2)^2 with sums, as the paper and torchtune write it."""
    means, sums = (
        DPOLoss(DPOConfig(kl_beta=0.25, loss_type=("ipo",), length_normalization=n)) for n in (None, False)
    )
    assert loss_of(slots, means, [4.0, -3.0], [2.0, 3.0]) == pytest.approx([1.0])
    assert loss_of(slots, sums, [4.0, -3.0], [2.0, 3.0]) == pytest.approx([25.0])


def test_length_normalised_sigmoid_is_sigmoid_norm(slots: Slots) -> None:
    pair = ([4.0, -3.0], [2.0, 3.0])
    normalised = loss_of(slots, DPOLoss(DPOConfig(kl_beta=0.7, length_normalization=True)), *pair)
    assert normalised == loss_of(slots, DPOLoss(DPOConfig(kl_beta=0.7, loss_type=("sigmoid_norm",))), *pair)
    assert normalised == pytest.approx([math.log1p(math.exp(-0.7 * 3))])


def test_bco_takes_the_mean_reward_off(slots: Slots) -> None:
    """Rewards 3 and 1, mean 2: -log sigmoid(1) - log sigmoid(1) = 2 * 0.313262. An empty place beside
    them does not count. With 2 responses of mean 6 seen before: (6 * 2 + 2 * 2) / 4 = 4, so
    -log sigmoid(-1) - log sigmoid(3) = 1.313262 + 0.048587."""
    loss = DPOLoss(DPOConfig(kl_beta=1.0, loss_type=("bco_pair",)))
    policy = slots(torch.tensor([3.0, 1.0, 50.0, 50.0]))
    policy = replace(policy, valid=torch.tensor([True, True, False, False]))
    reference = slots(torch.zeros(4))
    assert loss.couples_examples
    assert loss(policy, reference).losses[0].item() == pytest.approx(2 * 0.313262, abs=1e-6)
    state = loss.next_state(torch.tensor([6.0, 2.0]), policy, reference)
    assert state.tolist() == [4.0, 4.0]
    shifted = loss.with_state(state)(policy, reference).losses[0].item()
    assert shifted == pytest.approx(1.313262 + 0.048587, abs=1e-6)
    first = loss.initial_state()
    assert first is not None and loss.next_state(first, policy, reference).tolist() == [2.0, 2.0]


def test_aot_by_hand(slots: Slots) -> None:
    """Policy margins 3, 1, 2 and reference margins 0, 2, 1: sorted differences are all 1, so each pair's
    loss is ln(1 + e^-1), where plain DPO has differences 3, -1, 1. An empty place sorts nowhere."""
    policy = slots(torch.tensor([3.0, 0.0, 1.0, 0.0, 2.0, 0.0, 9.0, 0.0]))
    policy = replace(policy, valid=torch.tensor([True] * 6 + [False] * 2))
    reference = policy.with_sums(torch.tensor([0.0, 0.0, 2.0, 0.0, 1.0, 0.0, -7.0, 0.0]))
    losses = DPOLoss(DPOConfig(kl_beta=1.0, loss_type=("aot",)))(policy, reference).losses
    assert losses[:3].tolist() == pytest.approx([math.log1p(math.exp(-1))] * 3)


def test_discopop_where_a_plain_exponential_overflows(slots: Slots) -> None:
    """h = -1000: the modulation is 0, so the loss is -log sigmoid(h) = 1000; its slope in h is -1.
    h = +1000: the modulation is 1, and exp(-1000) is 0."""
    for sums, wanted, slope in (([-1e4, 0.0], 1000.0, -0.1), ([1e4, 0.0], 0.0, 0.0)):
        leaf = torch.tensor(sums, requires_grad=True)
        loss = DPOLoss(DPOConfig(kl_beta=0.1, loss_type=("discopop",)))(
            slots(leaf), slots(torch.zeros(2))
        ).losses.sum()
        loss.backward()
        assert loss.item() == pytest.approx(wanted)
        assert leaf.grad is not None and leaf.grad[0].item() == pytest.approx(slope)


@pytest.mark.parametrize(("tau", "slope"), [(0.05, 0.784264), (0.25, -0.443147)])
def test_discopop_lowers_a_margin_of_0_where_its_temperature_is_low(
    slots: Slots, tau: float, slope: float
) -> None:
    """At h = 0 both parts are half: d loss / dh = (1 - ln 2) / (4 tau) - 3 / 4, 0 at tau = (1 - ln 2) / 3."""
    leaf = torch.zeros(2, requires_grad=True)
    loss = DPOLoss(DPOConfig(kl_beta=1.0, loss_type=("discopop",), discopop_tau=tau))(
        slots(leaf), slots(torch.zeros(2))
    )
    loss.losses.sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == pytest.approx([slope, -slope], abs=1e-6)


def test_divergences_by_hand() -> None:
    """u = 2: ln 2; 1 - 1/2; ln(4/3); (2^-0.5 - 1) / -0.5 = 0.585786; alpha 0 is forward KL."""
    x = torch.tensor([LN2])
    wanted = dict(zip(F_DIVERGENCES, (LN2, 0.5, math.log(4 / 3), 0.585786), strict=True))
    for kind, value in wanted.items():
        assert divergence_score(x, kind).item() == pytest.approx(value, abs=1e-6)
    assert divergence_score(x, "alpha_divergence", 0.0).item() == pytest.approx(0.5)


def test_without_a_reference_the_policy_stands_alone(slots: Slots) -> None:
    """Log-probabilities -1 and -3, beta 0.5: h = 1."""
    loss = DPOLoss(DPOConfig(kl_beta=0.5, reference_free=True))
    assert not loss.needs_reference
    output = loss(slots(torch.tensor([-1.0, -3.0])), None)
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(-1)))


def test_a_likelihood_term_goes_with_any_form(slots: Slots) -> None:
    """Chosen: 6 nats over 3 tokens, so 0.5 * 2 on top."""
    for name in FORMS:
        plain = DPOLoss(DPOConfig(kl_beta=0.1, loss_type=(name,)))
        policy = slots(torch.tensor([-6.0, -4.0]), torch.tensor([3.0, 2.0]))
        reference = slots(torch.tensor([-5.0, -5.0]), torch.tensor([3.0, 2.0]))
        with_nll = DPOLoss(replace(plain.config, nll_scale=0.5))(policy, reference)
        added = with_nll.losses - plain(policy, reference).losses
        assert added.item() == pytest.approx(1.0, abs=1e-5)
        assert with_nll.extras["nll_loss"].item() == 2.0


def test_wpo_weight_of_a_uniform_policy_is_one(slots: Slots) -> None:
    """p = 1/8 at each of 2 and 3 tokens, sum of squares 1/8. Twice as likely: 2 * 2 for the pair."""
    counts = torch.tensor([2.0, 3.0])
    policy = slots(-counts * math.log(8), counts)
    assert wpo_weights(replace(policy, collisions=policy.sums)).item() == pytest.approx(1.0)
    doubled = replace(policy, collisions=policy.sums - counts * LN2)
    assert wpo_weights(doubled).item() == pytest.approx(4.0)
    with pytest.raises(ValueError, match="need the log of summed squared probabilities"):
        wpo_weights(policy)


def test_fairseq2s_orpo_lambda_and_nll_scale(slots: Slots) -> None:
    """Probabilities 1/2 and 1/4: log odds ratio ln 3, so -log sigmoid is ln(4/3)."""
    policy = slots(torch.tensor([math.log(0.5), math.log(0.25)]))
    losses = ORPOLoss(ORPOConfig(beta=0.3, nll_scale=0.7))(policy, None).losses
    assert losses.item() == pytest.approx(0.7 * LN2 + 0.3 * math.log(4 / 3))


def test_simpo_by_hand(slots: Slots) -> None:
    """Means -1 and -2, beta 2, gamma 0.5: h = 2 * 1 - 0.5 = 1.5; with the likelihood, 0.1 * 1 on top."""
    policy = slots(torch.tensor([-3.0, -4.0]), torch.tensor([3.0, 2.0]))
    loss = SimPOLoss(SimPOConfig(beta=2.0, gamma=0.5, nll_scale=0.1))(policy, None).losses
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)) + 0.1)


ALL: dict[str, Any] = {
    **{
        f"{name}, {kind}": DPOLoss(
            DPOConfig(kl_beta=0.1, loss_type=(name,), f_divergence_type=kind, nll_scale=1.0)
        )
        for name, form in FORMS.items()
        for kind in (F_DIVERGENCES if form.of_difference else F_DIVERGENCES[:1])
    },
    "weighted": DPOLoss(
        DPOConfig(kl_beta=0.1, loss_type=("sigmoid", "ipo"), loss_weights=(0.5, 2.0), use_weighting=True)
    ),
    "cpo": CPOLoss(),
    "simpo": SimPOLoss(),
    "orpo": ORPOLoss(ORPOConfig(beta=0.1)),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_loss_is_finite_at_the_extremes(slots: Slots, name: str, dtype: torch.dtype) -> None:
    """Log-ratios to +-1e4, lengths 1 and 4,096, probabilities at 1 - 1e-8; value and gradient."""
    loss = ALL[name]
    for chosen, rejected in [(-1e-8, -1e4), (-1e4, -1e-8), (-1e-8, -1e-8), (-1e4, -1e4), (-1.0, -1.0)]:
        for lengths in ([1.0, 4096.0], [4096.0, 1.0]):
            leaf = torch.tensor([chosen, rejected], dtype=dtype, requires_grad=True)
            policy = replace(slots(leaf, torch.tensor(lengths)), collisions=torch.tensor([-1.0, -1.0]))
            for base in ([-1e-8, -1e4], [-1e4, -1e-8]):
                leaf.grad = None
                output = loss(policy, slots(torch.tensor(base, dtype=dtype), torch.tensor(lengths)))
                assert output.losses.dtype == torch.float32
                output.losses.sum().backward()
                gradient: Tensor | None = leaf.grad
                assert gradient is not None and gradient.isfinite().all(), (chosen, rejected, base)
                assert output.losses.isfinite().all(), (chosen, rejected, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reference_free": True, "loss_type": ("nca_pair",)},
            "with loss_type nca_pair, which needs a reference",
        ),
        ({"reference_free": True, "f_divergence_type": "forward_kl"}, "a divergence from a reference"),
        (
            {"f_divergence_type": "forward_kl", "loss_type": ("aot",)},
            "reverse_kl with loss_type aot",
        ),
        ({"f_divergence_type": "kl"}, "f_divergence_type: must be one of reverse_kl, .*, but is 'kl'"),
        ({"use_weighting": True, "loss_type": ("aot",)}, "loss_type aot, which sorts"),
        ({"loss_type": ("exo_pair",), "label_smoothing": 0.0}, "must be above 0 with loss_type exo_pair"),
        ({"loss_type": ("sigmoid", "ipo"), "loss_weights": (1.0,)}, r"\(2: sigmoid, ipo\), but is \[1.0\]"),
        ({"loss_weights": (-1.0,)}, r"must be at least 0, and not all 0, but is \[-1.0\]"),
        ({"loss_type": ()}, "must name at least one loss"),
        ({"loss_type": ("sigmoyd",)}, "loss_type: must be one of sigmoid, .*, but is 'sigmoyd'"),
        ({"gamma": 0.0}, "dpo.gamma: must be above 0, but is 0.0"),
        ({"nll_scale": -1.0}, "dpo.nll_scale: must be at least 0, but is -1.0"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPOLoss(DPOConfig(kl_beta=0.1, **settings))


@pytest.mark.parametrize(("loss", "section"), [(CPOLoss, CPOConfig), (SimPOLoss, SimPOConfig)])
def test_reference_free_losses_check_their_numbers(loss: Any, section: Any) -> None:
    for settings, message in (
        ({"beta": 0.0}, "beta: must be above 0, but is 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing: must be below 0.5, but is 0.5"),
        ({"nll_scale": math.inf}, "nll_scale: must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(section(**settings))


def test_every_form_of_the_table_can_be_computed() -> None:
    """A row without its function would be found at training; here it is found at once."""
    assert all(callable(form_function(name)) for name in FORMS)


def test_a_text_for_a_number_in_a_section_made_by_hand_is_named() -> None:
    with pytest.raises(ConfigError, match=r"kl_beta: must be a finite number, but is '?0\.1"):
        DPOLoss(DPOConfig(kl_beta="0.1"))  # type: ignore[arg-type]
