"""A loss that couples the batch's examples: the two-pass gradient is that of the one-pass loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, Batch
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.types import ResponseLogps

MakeBatch = Callable[..., Batch]
TakeRows = Callable[[Batch, int, int], Batch]
ROWS = [[3, 2, 1, 4], [5, 1, 0, 0], [0, 0, 2, 2], [1, 1, 7, 3], [0, 0, 0, 0], [2, 6, 4, 4]]
PAIRS = 8.0
LOSSES = {
    "aot": DPOLoss(DPOConfig(kl_beta=0.3, label_smoothing=0.1, loss_type=("aot",))),
    "aot_unpaired": DPOLoss(DPOConfig(kl_beta=0.3, loss_type=("aot_unpaired",))),
    "bco_pair": DPOLoss(DPOConfig(kl_beta=0.3, loss_type=("bco_pair",))),
    "mixed": DPOLoss(
        DPOConfig(kl_beta=0.3, loss_type=("sigmoid", "aot"), loss_weights=(0.5, 2.0), nll_scale=0.7)
    ),
    "weighted bco": DPOLoss(DPOConfig(kl_beta=0.3, loss_type=("bco_pair",), use_weighting=True)),
}


def case(make_batch: MakeBatch) -> tuple[Batch, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(ROWS, PAIRS, 50.0, -torch.rand(len(ROWS), 4, generator=generator) * 5)
    there = batch.labels != IGNORE_LABEL
    logps, collisions = (-torch.rand(there.shape, generator=generator) * 2 for _ in range(2))
    return batch, torch.where(there, logps, 0.0), torch.where(there, collisions, 0.0)


def read(objective: GlobalMeanObjective, collisions: Tensor) -> list[Tensor]:
    return [collisions for _ in objective.wanted]


def two_passes(
    objective: GlobalMeanObjective, parts: list[tuple[Batch, Tensor, Tensor]]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """As an engine goes about it; the gradient of all token log-probs, (B, T)."""
    tables = [objective.statistics(b, logps, read(objective, collisions)) for b, logps, collisions in parts]
    loss, metrics, rows = objective.couple(torch.cat(tables), parts[0][0], training=True)
    assert rows is not None
    found = []
    for (batch, logps, _), gradients in zip(parts, rows.split([len(t) for t in tables]), strict=True):
        leaf = logps.clone().requires_grad_()
        found.append(torch.autograd.grad(objective.surrogate(batch, leaf, gradients), leaf)[0])
    return loss, metrics, torch.cat(found)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tail_weight", [None, 0.3])
def test_every_split_gives_the_gradient_of_the_whole(
    make_batch: MakeBatch, take_rows: TakeRows, name: str, tail_weight: float | None
) -> None:
    batch, logps, collisions = case(make_batch)
    if tail_weight is not None:
        batch = batch.with_tail_weight(tail_weight)
    loss = LOSSES[name]
    leaf = logps.clone().requires_grad_()
    policy = ResponseLogps.from_tokens(batch, leaf, {"collisions": collisions})
    assert batch.reference_logps is not None
    losses = loss(policy, policy.with_sums(batch.reference_logps)).losses
    wanted = torch.where(policy.valid[0::2], losses, 0.0).sum() / PAIRS
    (gradient,) = torch.autograd.grad(wanted, leaf)

    for cuts in ([0, 6], [0, 1, 6], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6]):
        spans = list(pairwise(cuts))
        parts = [(take_rows(batch, a, b), logps[a:b], collisions[a:b]) for a, b in spans]
        value, metrics, found = two_passes(GlobalMeanObjective(loss), parts)
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6)
        assert "rewards/margins" in metrics and "logps/chosen_per_token" in metrics


def test_bco_remembers_what_it_was_trained_on(make_batch: MakeBatch) -> None:
    """Two steps of the same batch have the mean of one; validation in between changes nothing, and an
    objective that is handed the state goes on as the first one does."""
    batch, logps, _ = case(make_batch)
    objective = GlobalMeanObjective(LOSSES["bco_pair"])
    table = objective.statistics(batch, logps)
    first, _, _ = objective.couple(table, batch, training=True)
    assert objective.state is not None and objective.state[1] == 16
    kept = objective.state.clone()
    moved = objective.statistics(batch, logps - 1)
    loss, metrics, none = objective.couple(moved, batch, training=False)
    assert none is None, "autograd's thread would hold tensors beyond the end of a validation step"
    assert not any(value.requires_grad for value in (loss, *metrics.values()))
    assert torch.equal(objective.state, kept)
    resumed = GlobalMeanObjective(LOSSES["bco_pair"])
    resumed.state = kept.clone()
    again, _, gradients = objective.couple(moved, batch, training=True)
    other, _, other_gradients = resumed.couple(moved, batch, training=True)
    assert torch.equal(again, other) and torch.equal(gradients, other_gradients)
    fresh, _, _ = GlobalMeanObjective(LOSSES["bco_pair"]).couple(moved, batch, training=True)
    assert abs(float(again - fresh)) > 1e-3
    assert (
        GlobalMeanObjective(DPOLoss(replace(LOSSES["bco_pair"].config, bco_reward_shift="none"))).state
        is None
    )
    assert float(first) > 0
