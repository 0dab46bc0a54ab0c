from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, Batch
from nxdt_align.config.alignment import DPOConfig, ORPOConfig
from nxdt_align.losses.cpo import CPOLoss, SimPOLoss
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.losses.sft import SFTLoss
from nxdt_align.losses.types import Loss, LossOutput, ResponseLogps

MakeBatch = Callable[..., Batch]
TakeRows = Callable[[Batch, int, int], Batch]

# 8 pairs in 6 rows of 2 places per row; the last row is empty, and places end up empty elsewhere too.
ROWS = [[3, 2, 1, 4], [5, 1, 0, 0], [0, 0, 2, 2], [1, 1, 7, 3], [2, 6, 4, 4], [0, 0, 0, 0], [3, 3, 0, 0]]
PAIRS = 9.0
ALL = [
    DPOLoss(DPOConfig(kl_beta=0.3)),
    DPOLoss(DPOConfig(kl_beta=0.3, label_smoothing=0.2)),
    ORPOLoss(ORPOConfig(beta=0.1)),
    SimPOLoss(),
    CPOLoss(),
    SFTLoss(),
]
TOKENS = float(sum(map(sum, ROWS)))


def preference_batch(make_batch: MakeBatch) -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = -torch.rand(len(ROWS), 4, generator=generator) * 5
    batch = make_batch(ROWS, PAIRS, TOKENS, reference)
    logps = -torch.rand(batch.labels.shape, generator=generator) * 2
    return batch, torch.where(batch.labels != IGNORE_LABEL, logps, 0.0)


def evaluate(
    objective: GlobalMeanObjective, batch: Batch, logps: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    leaf = logps.clone().requires_grad_()
    loss, metrics = objective(batch, leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), metrics, gradient


def test_dpo_share_and_metrics_by_hand(make_batch: MakeBatch) -> None:
    """One of two pairs. Chosen -1 - 1 = -2 against -4: ratio 2. Rejected -3 against -2: ratio -1.
    Margin 3, beta 1: loss ln(1 + e^-3) = 0.0485874, half of it is the share."""
    batch = make_batch([[2, 1]], 2.0, 99.0, torch.tensor([[-4.0, -2.0]]))
    loss, metrics, gradient = evaluate(
        GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=1.0))), batch, torch.tensor([[-1.0, -1.0, -3.0]])
    )
    assert loss.item() == pytest.approx(0.0485874 / 2, rel=1e-5)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "chosen_rewards": 1.0,
            "rejected_rewards": -0.5,
            "rewards/chosen": 1.0,
            "rewards/rejected": -0.5,
            "rewards/accuracies": 0.5,
            "rewards/margins": 1.5,
            "logps/chosen": -1.0,
            "logps/rejected": -1.5,
            "logps/chosen_per_token": -0.5,
            "logps/rejected_per_token": -1.5,
            "rewards/accuracies_chosen_longer": 0.5,
            "rewards/accuracies_chosen_longer (divisor)": 0.5,
            "rewards/accuracies_rejected_longer": 0.0,
            "rewards/accuracies_rejected_longer (divisor)": 0.0,
        }
    )
    slope = 1 / (1 + math.exp(3)) / 2
    torch.testing.assert_close(gradient, torch.tensor([[-slope, -slope, slope]]))


def test_accuracy_by_which_response_is_longer(make_batch: MakeBatch) -> None:
    """Chosen longer: right, wrong. Rejected longer: right. Equal: wrong, in neither. A global mean of the
    first is 1/2, over both halves of the batch; of the second 1. Half a batch without such a pair
    leaves its metric out, but adds up with the other half."""
    rows = [[2, 1], [3, 1], [1, 2], [2, 2]]
    logps = torch.tensor([[-1.0, -1, -3, 0], [-1, -1, -1, -1], [-1, -1, -1, 0], [-2, -2, -1, -1]])
    objective = GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=1.0, reference_free=True)))
    whole = objective(make_batch(rows, 4.0, 14.0), logps)[1]
    assert objective.finish(whole)["rewards/accuracies"].item() == 0.5
    assert objective.finish(whole)["rewards/accuracies_chosen_longer"].item() == 0.5
    assert objective.finish(whole)["rewards/accuracies_rejected_longer"].item() == 1.0
    halves = [objective(make_batch(rows[i : i + 2], 4.0, 14.0), logps[i : i + 2])[1] for i in (0, 2)]
    assert "rewards/accuracies_rejected_longer" not in objective.finish(halves[0])
    summed = {name: halves[0][name] + halves[1][name] for name in whole}
    assert objective.finish(summed) == objective.finish(whole)


def test_orpo_reports_means_a_token_and_its_own_metrics(make_batch: MakeBatch) -> None:
    batch = make_batch([[2, 1]], 1.0, 99.0)
    half, quarter = math.log(0.5), math.log(0.25)
    _, metrics, _ = evaluate(
        GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=0.1))), batch, torch.tensor([[half, half, quarter]])
    )
    assert metrics["logps/chosen"].item() == pytest.approx(half)
    assert metrics["logps/rejected"].item() == pytest.approx(quarter)
    assert metrics["nll_loss"].item() == pytest.approx(-half)
    assert metrics["log_odds_chosen"].item() == pytest.approx(math.log(3))
    assert metrics["log_odds_ratio"].item() == pytest.approx(math.log(0.75))
    assert metrics["rewards/accuracies"].item() == 1.0


def test_sft_divides_by_tokens(make_batch: MakeBatch) -> None:
    """Sums -2 (1 token) and -3 (3 tokens) of a global batch of 8 tokens in 4 responses."""
    batch = make_batch([[1, 3]], 4.0, 8.0)
    loss, metrics, gradient = evaluate(
        GlobalMeanObjective(SFTLoss()), batch, torch.tensor([[-2.0, -1.0, -1.0, -1.0]])
    )
    assert loss.item() == 5 / 8
    assert metrics == {}
    torch.testing.assert_close(gradient, torch.full((1, 4), -1 / 8))


@pytest.mark.parametrize("loss", ALL)
def test_any_split_adds_up_to_the_same(make_batch: MakeBatch, take_rows: TakeRows, loss: Loss) -> None:
    batch, logps = preference_batch(make_batch)
    objective = GlobalMeanObjective(loss)
    whole, whole_metrics, whole_gradient = evaluate(objective, batch, logps)
    chooser = random.Random(0)
    for _ in range(10):
        cuts = sorted(chooser.sample(range(1, len(ROWS)), chooser.randint(1, len(ROWS) - 1)))
        spans = list(zip([0, *cuts], [*cuts, len(ROWS)], strict=True))
        parts = [evaluate(objective, take_rows(batch, a, b), logps[a:b]) for a, b in spans]
        torch.testing.assert_close(sum(p[0] for p in parts), whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat([p[2] for p in parts]), whole_gradient, rtol=1e-6, atol=1e-6)
        for name, value in whole_metrics.items():
            total = torch.stack([p[1][name] for p in parts]).sum()
            torch.testing.assert_close(total, value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [DPOLoss(DPOConfig(kl_beta=0.3)), ORPOLoss(ORPOConfig(beta=0.1)), SFTLoss()])
def test_layout_does_not_matter(make_batch: MakeBatch, loss: Loss) -> None:
    """The same pairs one per row, or packed: same loss, metrics and gradients of the tokens."""
    batch, logps = preference_batch(make_batch)
    lengths, values, references = [], [], []
    assert batch.reference_logps is not None
    for row, tokens, reference in zip(ROWS, logps, batch.reference_logps, strict=True):
        start = 0
        for k in range(0, len(row), 2):
            size = row[k] + row[k + 1]
            if size:
                lengths.append(row[k : k + 2])
                values.append(tokens[start : start + size])
                references.append(reference[k : k + 2])
            start += size
    padded = make_batch(lengths, PAIRS, TOKENS, torch.stack(references))
    padded_logps = torch.zeros(padded.labels.shape)
    for row_out, tokens in zip(padded_logps, values, strict=True):
        row_out[: len(tokens)] = tokens
    objective = GlobalMeanObjective(loss)
    packed_result, padded_result = (
        evaluate(objective, b, v) for b, v in ((batch, logps), (padded, padded_logps))
    )
    torch.testing.assert_close(packed_result[0], padded_result[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed_result[1], padded_result[1], rtol=1e-6, atol=1e-6)
    packed_tokens = packed_result[2][batch.labels != IGNORE_LABEL]
    padded_tokens = padded_result[2][padded.labels != IGNORE_LABEL]
    torch.testing.assert_close(packed_tokens, padded_tokens, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [DPOLoss(DPOConfig(kl_beta=0.3)), ORPOLoss(ORPOConfig(beta=0.1)), SFTLoss()])
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf])
def test_empty_rows_give_no_loss_and_no_gradient(make_batch: MakeBatch, loss: Loss, fill: float) -> None:
    """Whatever a model answers at padding, NaN included, stays out of loss, metrics and gradients."""
    batch = make_batch([[0, 0], [0, 0]], 4.0, 10.0, torch.full((2, 2), fill))
    value, metrics, gradient = evaluate(
        GlobalMeanObjective(loss), batch, torch.full(batch.labels.shape, fill)
    )
    assert value.item() == 0.0
    assert all(metric.item() == 0.0 for metric in metrics.values())
    assert not gradient.any() and gradient.isfinite().all()


def test_nan_of_a_loss_at_an_empty_place_does_not_leak(make_batch: MakeBatch) -> None:
    class NanWhereEmpty(DPOLoss):
        def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
            output = super().__call__(policy, reference)
            return replace(output, losses=torch.where(policy.valid[0::2], output.losses, math.nan))

    batch = make_batch([[1, 1], [0, 0]], 1.0, 2.0, torch.zeros(2, 2))
    value, _, gradient = evaluate(
        GlobalMeanObjective(NanWhereEmpty(DPOConfig(kl_beta=1.0))), batch, torch.full((2, 2), -1.0)
    )
    assert value.item() == pytest.approx(math.log(2))
    assert gradient.isfinite().all()


def test_a_whole_policy_equal_to_its_reference(make_batch: MakeBatch) -> None:
    batch, logps = preference_batch(make_batch)
    batch = batch.with_reference(batch.sum_per_slot(logps))
    value, metrics, _ = evaluate(GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1))), batch, logps)
    assert value.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/margins"].item() == 0.0
    assert metrics["rewards/accuracies"].item() == 0.0


def test_scalars_expanded_to_rows_are_taken(make_batch: MakeBatch) -> None:
    batch, logps = preference_batch(make_batch)
    rows = replace(
        batch, global_pairs=batch.global_pairs.expand(7), global_tokens=batch.global_tokens.expand(7)
    )
    for loss in (DPOLoss(DPOConfig(kl_beta=0.1)), SFTLoss()):
        objective = GlobalMeanObjective(loss)
        assert torch.equal(evaluate(objective, rows, logps)[0], evaluate(objective, batch, logps)[0])


def test_bf16_log_probabilities_are_summed_in_fp32(make_batch: MakeBatch) -> None:
    batch = make_batch([[4096, 1]], 1.0, 4097.0, torch.tensor([[-4096.0, -1.0]]))
    logps = torch.full((1, 4097), -1.0, dtype=torch.bfloat16)
    loss, metrics = GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1)))(batch, logps)
    assert loss.dtype == torch.float32
    assert all(m.dtype == torch.float32 and m.ndim == 0 and not m.requires_grad for m in metrics.values())
    assert metrics["logps/chosen"].item() == -4096.0


def test_objective_says_what_it_needs() -> None:
    assert GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1))).needs_reference
    assert not GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=0.1))).needs_reference
    assert not GlobalMeanObjective(SFTLoss()).wanted
    assert GlobalMeanObjective(SFTLoss()).normaliser == "tokens"
    assert GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1))).normaliser == "pairs"


def test_a_missing_reference_is_named(make_batch: MakeBatch) -> None:
    batch = make_batch([[1, 1]], 1.0, 2.0)
    with pytest.raises(ValueError, match=r"DPOLoss.*needs the reference's log-probabilities"):
        GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1)))(batch, torch.zeros(1, 2))


@dataclass(frozen=True)
class OutsideLoss(ORPOLoss):
    """A loss from elsewhere, with whatever it declares."""

    beta: float = 0.1
    scalar: bool = False

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        output = super().__call__(policy, reference)
        return replace(output, losses=output.losses.mean()) if self.scalar else output


class CouplesLogits(OutsideLoss):
    couples_examples = needs_logits = True


class NeedsLogits(OutsideLoss):
    needs_logits = True


class CouplesTokens(OutsideLoss):
    couples_examples = needs_tokens = True


class CouplesPrompts(OutsideLoss):
    couples_examples = needs_prompts = True


class NeedsCollisions(OutsideLoss):
    needs_collisions = True


def test_what_no_engine_can_serve_is_refused(make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=r"couples the examples .* and reads logits"):
        GlobalMeanObjective(CouplesLogits())
    with pytest.raises(ValueError, match=r"couples the examples .* wants each token's log-probability"):
        GlobalMeanObjective(CouplesTokens())
    with pytest.raises(ValueError, match=r"couples the examples .* wants the prompts' log-probabilities"):
        GlobalMeanObjective(CouplesPrompts())
    batch = make_batch([[1, 1], [1, 1]], 2.0, 4.0)
    with pytest.raises(ValueError, match="no value for a micro-batch alone"):
        GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1, loss_type=("aot",))))(batch, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"needs 1 values per token .*collisions.* but got 0"):
        GlobalMeanObjective(NeedsCollisions())(batch, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"needs 1 values per token .*logits.* but got 0"):
        GlobalMeanObjective(NeedsLogits())(batch, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"one value per example, shape \(2,\), but returned shape \(\)"):
        GlobalMeanObjective(OutsideLoss(scalar=True))(batch, torch.zeros(2, 2))
