from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nxdt_align.config.alignment import DPOConfig, ORPOConfig
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.forms import sigmoid_loss
from nxdt_align.losses.orpo import ORPOLoss, log1mexp, log_odds_ratio
from nxdt_align.losses.types import ResponseLogps

Slots = Callable[..., ResponseLogps]


def value_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = log1mexp(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def exact(x: float) -> tuple[float, float]:
    """log(1 - e^x) and its derivative -1 / (e^-x - 1) in double precision, free of cancellation."""
    return math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x)), -1 / math.expm1(-x)


@pytest.mark.parametrize("x", [-1e-11, -1e-8, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -10.0, -60.0])
def test_log1mexp_value_and_gradient_fp32(x: float) -> None:
    argument = torch.tensor([x])
    value, gradient = value_and_gradient(argument)
    wanted, slope = exact(argument.item())
    assert value.item() == pytest.approx(wanted, rel=2e-6)
    assert gradient.item() == pytest.approx(slope, rel=2e-6)


def test_log1mexp_of_hand_derived_values() -> None:
    """1 - e^(-ln 2) = 1/2 -> -ln 2, slope -1; 1 - e^(-ln 4) = 3/4 -> ln 0.75, slope -1/3."""
    value, gradient = value_and_gradient(torch.tensor([-math.log(2), -math.log(4)]))
    torch.testing.assert_close(value, torch.tensor([-math.log(2), math.log(0.75)]))
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -1 / 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log1mexp_is_finite_everywhere(dtype: torch.dtype) -> None:
    """NxDT's log(1 - exp(x)) has NaN gradients at -1e-3 in bf16 and -1e-8 in fp32."""
    points = [1e-6, 0.0, -1e-30, -1e-12, -1e-8, -1e-3, -0.693, -0.694, -5.0, -120.0, -1e4, -6e4]
    value, gradient = value_and_gradient(torch.tensor(points, dtype=dtype))
    assert value.dtype == torch.float32
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (value <= 0).all() and (gradient <= 0).all()


def test_log1mexp_in_bf16_is_the_fp32_value_of_the_same_number() -> None:
    x = torch.tensor([-1e-3, -0.3, -2.0], dtype=torch.bfloat16)
    torch.testing.assert_close(log1mexp(x), log1mexp(x.float()), rtol=0, atol=0)


def test_log1mexp_at_probability_one_stops_at_the_documented_value() -> None:
    value, gradient = value_and_gradient(torch.tensor([0.0, 1e-7]))
    torch.testing.assert_close(value, torch.full((2,), math.log(1e-12)))
    assert gradient.tolist() == [0.0, 0.0]


def test_log1mexp_keeps_double_precision() -> None:
    x = torch.linspace(-3, -0.01, 50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log1mexp, x)


def test_sigmoid_loss_by_hand() -> None:
    """margin 0: ln 2. beta 0.1, margin 10: ln(1 + e^-1) = 0.313262; margin -10: 1 more."""
    losses = sigmoid_loss(torch.tensor([0.0, 10.0, -10.0]), beta=0.1)
    torch.testing.assert_close(losses, torch.tensor([math.log(2), 0.3132617, 1.3132617]))


def test_label_smoothing_by_hand() -> None:
    """0.75 * 0.313262 + 0.25 * 1.313262 = 0.563262."""
    loss = sigmoid_loss(torch.tensor([10.0]), beta=0.1, label_smoothing=0.25)
    torch.testing.assert_close(loss, torch.tensor([0.5632617]))


def test_dpo_by_hand(slots: Slots) -> None:
    """log-ratios -10 - (-12) = 2 and -20 - (-17) = -3: margin 5; beta 0.2: ln(1 + e^-1), rewards
    0.4 and -0.6. d loss / d chosen = -beta * sigmoid(-1) = -0.2 * 0.268941 = -0.0537883."""
    sums = torch.tensor([-10.0, -20.0], requires_grad=True)
    output = DPOLoss(DPOConfig(kl_beta=0.2))(slots(sums), slots(torch.tensor([-12.0, -17.0])))
    output.losses.sum().backward()
    torch.testing.assert_close(output.losses.detach(), torch.tensor([0.3132617]))
    torch.testing.assert_close(output.chosen_rewards, torch.tensor([0.4]))
    torch.testing.assert_close(output.rejected_rewards, torch.tensor([-0.6]))
    torch.testing.assert_close(sums.grad, torch.tensor([-0.0537883, 0.0537883]))


def test_dpo_of_a_policy_that_is_its_reference_is_exactly_ln_2(slots: Slots) -> None:
    sums = -torch.rand(64) * 1e4
    output = DPOLoss(DPOConfig(kl_beta=0.1))(slots(sums), slots(sums.clone()))
    assert torch.equal(output.losses, torch.full((32,), math.log(2)))
    assert output.chosen_rewards is not None and not output.chosen_rewards.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_at_the_extremes(slots: Slots, ratio: float, dtype: torch.dtype, smoothing: float) -> None:
    """A log-ratio of +-1e4: the loss is beta * 1e4 or 0 (NxDT's log(sigmoid) is -inf at -120)."""
    sums = torch.tensor([-2e4 + ratio, -2e4], dtype=dtype, requires_grad=True)
    reference = slots(torch.tensor([-2e4, -2e4], dtype=dtype))
    losses = DPOLoss(DPOConfig(kl_beta=1.0, label_smoothing=smoothing))(slots(sums), reference).losses
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all() and sums.grad is not None and sums.grad.isfinite().all()
    if smoothing == 0.0:
        wanted = {1e4: 0.0, -1e4: 1e4, 0.0: math.log(2)}[ratio]
        assert losses.item() == pytest.approx(wanted, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_log_odds_ratio_by_hand() -> None:
    """odds(1/2) = 1, odds(1/4) = 1/3, so ln 3."""
    odds = log_odds_ratio(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]))
    torch.testing.assert_close(odds, torch.tensor([math.log(3)]))


def test_orpo_by_hand(slots: Slots) -> None:
    """Mean log-probs ln 1/2 (2 tokens) and ln 1/4 (3 tokens): NLL ln 2 = 0.693147; log odds ln 3;
    -log sigmoid(ln 3) = ln(4/3) = 0.287682; beta 0.1: 0.721915. Rewards 0.1 ln 1/2 and 0.1 ln 1/4."""
    sums = torch.tensor([2 * math.log(0.5), 3 * math.log(0.25)])
    output = ORPOLoss(ORPOConfig(beta=0.1))(slots(sums, torch.tensor([2.0, 3.0])), None)
    torch.testing.assert_close(output.losses, torch.tensor([0.7219154]))
    torch.testing.assert_close(output.chosen_rewards, torch.tensor([-0.0693147]))
    torch.testing.assert_close(output.rejected_rewards, torch.tensor([-0.1386294]))
    expected = {
        "nll_loss": 0.6931472,
        "log_odds_ratio": -0.2876821,
        "log_odds_chosen": 1.0986123,
        "logps/chosen": -0.6931472,
        "logps/rejected": -1.3862944,
    }
    assert {name: v.item() for name, v in output.extras.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 4096])
@pytest.mark.parametrize("mean_chosen", [0.0, -1e-8, -1e-3, -1.0, -120.0])
@pytest.mark.parametrize("mean_rejected", [0.0, -1e-8, -1e-3, -1.0, -120.0])
def test_orpo_at_the_extremes(
    slots: Slots, mean_chosen: float, mean_rejected: float, length: int, dtype: torch.dtype
) -> None:
    sums = (torch.tensor([mean_chosen, mean_rejected]) * length).to(dtype).requires_grad_()
    output = ORPOLoss(ORPOConfig(beta=0.1))(slots(sums, torch.tensor([length, length])), None)
    output.losses.sum().backward()
    assert output.losses.isfinite().all() and output.losses.dtype == torch.float32
    assert sums.grad is not None and sums.grad.isfinite().all()


def test_orpo_with_a_nearly_certain_response(slots: Slots) -> None:
    """Chosen at p = 1 - 1e-8, rejected at 1/2: log odds = ln(p / 1e-8) = 18.420681."""
    sums = torch.tensor([math.log1p(-1e-8), math.log(0.5)])
    output = ORPOLoss(ORPOConfig(beta=0.1))(slots(sums), None)
    torch.testing.assert_close(output.extras["log_odds_chosen"], torch.tensor([18.420681]))


def test_dpo_without_a_reference_says_so(slots: Slots) -> None:
    with pytest.raises(ValueError, match="needs the reference"):
        DPOLoss(DPOConfig(kl_beta=0.1))(slots(torch.zeros(2)), None)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_beta_must_be_a_positive_number(beta: float) -> None:
    with pytest.raises(ValueError, match=r"dpo.kl_beta: must be (above 0|a finite number), but is"):
        DPOLoss(DPOConfig(kl_beta=beta))
    with pytest.raises(ValueError, match=r"orpo.beta: must be (above 0|a finite number), but is"):
        ORPOLoss(ORPOConfig(beta=beta))


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_must_stay_below_a_half(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: must be (at least 0|below 0\.5), but is"):
        DPOLoss(DPOConfig(kl_beta=0.1, label_smoothing=smoothing))
