"""The learning rate as a tensor during the step, and a number outside of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from nxdt_align.training.optim import SMALLEST, learning_rate_on_device


class Watching(SGD):
    """Notes what its step sees as the groups' learning rates."""

    seen: list[torch.Tensor]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.seen = [group["lr"] for group in self.param_groups]


@pytest.mark.parametrize("lr", [0.0, 1.0, 3e-4])
def test_a_step_sees_tensors_of_one_element(lr: float) -> None:
    """A warm-up's 0 arrives as something that torch's capturable step can divide by."""
    optimizer = Watching(
        [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(1))]}], lr
    )
    optimizer.param_groups[1]["lr"] = 0.5
    learning_rate_on_device(optimizer)
    for _ in range(2):
        optimizer.step()
        assert [tuple(seen.shape) for seen in optimizer.seen] == [(1,), (1,)]
        assert [float(seen) for seen in optimizer.seen] == pytest.approx([max(lr, SMALLEST), 0.5])
        assert [group["lr"] for group in optimizer.param_groups] == [lr, 0.5]
        assert optimizer.state_dict()["param_groups"][0]["lr"] == lr
