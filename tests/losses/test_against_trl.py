"""Plain DPO and ORPO against TRL's own code: value, gradient and metrics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from trl_losses import TOLERANCE, accelerator, interleave, takes_log_probs, trl_dpo, trl_orpo

from nxdt_align.config.alignment import DPOConfig, ORPOConfig
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.losses.types import LossOutput, ResponseLogps

Slots = Callable[..., ResponseLogps]


def means(output: LossOutput) -> dict[str, float]:
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    assert chosen is not None and rejected is not None
    return {
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/accuracies": (chosen > rejected).float().mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        **{name: value.mean().item() for name, value in output.extras.items()},
    }


@takes_log_probs
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_equals_trl(slots: Slots, seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs, width = 7, 33
    lengths = torch.randint(1, width + 1, (2 * pairs,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).float()
    tokens = -torch.rand(2 * pairs, width, generator=generator) * mask * 3
    reference = (tokens.sum(1) + torch.randn(2 * pairs, generator=generator)).detach()

    theirs_in, ours_in = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    theirs, metrics = trl_dpo(theirs_in, mask, reference, beta)
    output = DPOLoss(DPOConfig(kl_beta=beta))(slots(interleave(ours_in.sum(1))), slots(interleave(reference)))
    ours = output.losses.mean()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, **TOLERANCE)
    assert means(output) == pytest.approx({name: metrics[name] for name in means(output)}, abs=1e-6)


@takes_log_probs
@pytest.mark.parametrize("ratio", [1e4, -1e4, 50.0])
def test_dpo_equals_trl_at_the_extremes(slots: Slots, ratio: float) -> None:
    tokens = torch.tensor([[-1e4 + ratio], [-1e4]])
    reference = torch.tensor([-1e4, -1e4])
    theirs_in, ours_in = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    theirs, _ = trl_dpo(theirs_in, torch.ones(2, 1), reference, 0.1)
    ours = DPOLoss(DPOConfig(kl_beta=0.1))(
        slots(interleave(ours_in.sum(1))), slots(interleave(reference))
    ).losses.mean()
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, **TOLERANCE)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_equals_trl(slots: Slots, seed: int, beta: float) -> None:
    """With a prompt of one token and chosen responses of one length, TRL's likelihood (over prompt
    and chosen, averaged over the batch's tokens) is ours (over the response, averaged over pairs)."""
    generator = torch.Generator().manual_seed(seed)
    pairs, width, vocabulary = 5, 9, 11
    lengths = torch.randint(1, width, (2 * pairs,), generator=generator)
    lengths[:pairs] = lengths[0]
    ids = torch.randint(0, vocabulary, (2 * pairs, width), generator=generator)
    logits = torch.randn(2 * pairs, width, vocabulary, generator=generator) * 3

    theirs_in, ours_in = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    theirs, metrics = trl_orpo(theirs_in, ids, lengths, beta)
    token_logps = ours_in.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    token_logps = torch.where(torch.arange(width - 1) < lengths[:, None], token_logps, 0.0)
    output = ORPOLoss(ORPOConfig(beta=beta))(
        slots(interleave(token_logps.sum(1)), interleave(lengths).float()), None
    )
    ours = output.losses.mean()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, **TOLERANCE)
    assert means(output) == pytest.approx({name: metrics[name] for name in means(output)}, abs=1e-6)


@pytest.mark.parametrize("mean", [-1e-4, -1e-3, -0.5, -0.8, -30.0])
def test_odds_ratio_equals_trl_where_trl_is_stable(slots: Slots, mean: float) -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.accelerator, trainer.beta = accelerator(), 0.1
    chosen, rejected = torch.tensor([mean, -1.5]), torch.tensor([-1.0, mean])
    losses, chosen_rewards, rejected_rewards, ratio, log_odds = trainer.odds_ratio_loss(chosen, rejected)
    output = ORPOLoss(ORPOConfig(beta=0.1))(slots(torch.stack([chosen, rejected], 1).flatten()), None)
    torch.testing.assert_close(-0.1 * output.extras["log_odds_ratio"], -losses, **TOLERANCE)
    torch.testing.assert_close(output.extras["log_odds_ratio"].mean(), ratio, **TOLERANCE)
    torch.testing.assert_close(output.extras["log_odds_chosen"].mean(), log_odds, **TOLERANCE)
    torch.testing.assert_close(output.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(output.rejected_rewards, rejected_rewards)
