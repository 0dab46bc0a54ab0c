"""Losses that couple the examples of a global batch: the whole batch as one table of numbers.

Legend: ``N`` slots of a global batch, over all micro-batches and ranks; ``K`` columns.

The engine computes all log-probabilities without gradients, gathers this table, gets d loss / d
log-probability from it, and then runs the backward pass one micro-batch at a time with those. So the result
does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nxdt_align.batch import TokenStatistic
from nxdt_align.losses.types import ResponseLogps

_COLUMNS = ("sums", "plain_sums", "counts", "valid", "desirable", "roles", "collisions", "reference")


def to_table(policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
    """(N, K) float32 of a micro-batch's slots, without gradients."""
    zeros = torch.zeros_like(policy.sums)
    columns = (
        policy.sums,
        policy.sums if policy.plain_sums is None else policy.plain_sums,
        policy.counts,
        policy.valid,
        policy.desirable,
        policy.roles,
        zeros if policy.collisions is None else policy.collisions,
        zeros if reference is None else reference.sums,
        *policy.statistics.values(),
    )
    return torch.stack([column.detach().float() for column in columns], 1)


def from_table(
    table: Tensor, statistics: Sequence[TokenStatistic] = ()
) -> tuple[ResponseLogps, ResponseLogps]:
    """Policy, whose ``sums`` and ``plain_sums`` are leaves that take gradients, and reference.

    ``statistics``: the names of the policy's, which are the last columns.
    """
    column = dict(zip((*_COLUMNS, *statistics), table.unbind(1), strict=True))
    policy = ResponseLogps(
        sums=column["sums"].clone().requires_grad_(),
        counts=column["counts"],
        valid=column["valid"] > 0,
        desirable=column["desirable"] > 0,
        roles=column["roles"].long(),
        plain_sums=column["plain_sums"].clone().requires_grad_(),
        collisions=column["collisions"],
        statistics={name: column[name] for name in statistics},
    )
    return policy, policy.with_sums(column["reference"])


def gradients_of(share: Tensor, policy: ResponseLogps) -> Tensor:
    """(N, 2): d share / d sums and d share / d plain sums."""
    assert policy.plain_sums is not None
    found = torch.autograd.grad(share, [policy.sums, policy.plain_sums], allow_unused=True)
    return torch.stack([torch.zeros_like(policy.sums) if g is None else g for g in found], 1)


def surrogate(policy: ResponseLogps, gradients: Tensor) -> Tensor:
    """A scalar whose gradient is that of the coupled loss, from a micro-batch's rows of ``gradients``."""
    plain = policy.sums if policy.plain_sums is None else policy.plain_sums
    # The chain rule: d(sums * g)/d(sums) = g, with g constant.
    products = policy.sums * gradients[:, 0] + plain * gradients[:, 1]
    return torch.where(policy.valid, products, 0.0).sum()
