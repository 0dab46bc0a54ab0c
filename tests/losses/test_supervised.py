from __future__ import annotations

from collections.abc import Callable

import torch

from nxdt_align.losses.sft import SFTLoss
from nxdt_align.losses.types import ResponseLogps


def test_sft_by_hand(slots: Callable[..., ResponseLogps]) -> None:
    """Responses of 1 and 3 tokens with sums -2 and -3: the objective divides 2 + 3 nats by tokens."""
    sums = torch.tensor([-2.0, -3.0], requires_grad=True)
    output = SFTLoss()(slots(sums, torch.tensor([1.0, 3.0])), None)
    assert output.losses.tolist() == [2.0, 3.0]
    assert SFTLoss().normaliser == "tokens"
    assert output.chosen_rewards is None and output.rejected_rewards is None
    output.losses.sum().backward()
    assert sums.grad is not None and sums.grad.tolist() == [-1.0, -1.0]


def test_sft_in_bf16_returns_float32(slots: Callable[..., ResponseLogps]) -> None:
    output = SFTLoss()(slots(torch.tensor([-2.0], dtype=torch.bfloat16)), None)
    assert output.losses.dtype == torch.float32
