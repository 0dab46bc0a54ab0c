"""An optimizer whose step is part of a compiled graph: the learning rate goes in as a tensor.

As a number it would be a constant of the graph, and each change of it another graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

SMALLEST = 1e-20
"""Stands for a learning rate of 0, as a warm-up starts with: torch's capturable step divides by it, so
that a weight whose gradient is 0 would become NaN. Nothing that float32 can show moves at this rate."""


def learning_rate_on_device(optimizer: Optimizer) -> None:
    """Have every step see its groups' learning rates as tensors, (1,) float32, on the parameters' device.

    Outside of ``step`` they are numbers, for the schedule, the log and checkpoints.
    """
    numbers: list[float] = []

    def to_tensors(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        numbers[:] = [group["lr"] for group in stepping.param_groups]
        for group in stepping.param_groups:
            # One element and no scalar: XLA makes constants of scalars that are 0 or 1.
            group["lr"] = torch.tensor([max(group["lr"], SMALLEST)]).to(group["params"][0].device)

    def to_numbers(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        for group, number in zip(stepping.param_groups, numbers, strict=True):
            group["lr"] = number

    optimizer.register_step_pre_hook(to_tensors)
    optimizer.register_step_post_hook(to_numbers)
