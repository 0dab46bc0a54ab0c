"""Shared parts of losses: WPO's weights, a likelihood term, and the check of a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from nxdt_align.losses.types import ResponseLogps


def require_reference(loss: str, policy: ResponseLogps, reference: ResponseLogps | None) -> ResponseLogps:
    """``reference`` if it is given for the policy's responses; otherwise raises ValueError, naming
    ``loss``."""
    if reference is None:
        raise ValueError(f"{loss} needs the reference's log-probabilities, but got none")
    if reference.sums.shape != policy.sums.shape:
        # A single value would silently broadcast over all responses.
        raise ValueError(
            f"{loss} needs the reference's log-probabilities of the policy's {len(policy.sums)} "
            f"responses, but got {len(reference.sums)}"
        )
    return reference


def wpo_weights(policy: ResponseLogps) -> Tensor:
    """A pair's weight, (P,) float32 without gradient: how likely the policy is to generate it.

    Equation 2 of WPO (https://arxiv.org/abs/2406.11827) with the weight alignment of its section 3.2:
    exp(mean over tokens of log p(token) - log sum of squared probabilities), chosen times rejected, as
    TRL 1.16 computes it. By hand: a token drawn from a uniform policy over V has p = 1/V and sum of
    squares 1/V: weight 1. Raises ValueError where the collision terms are missing.
    """
    if policy.collisions is None:
        raise ValueError("WPO's weights need the log of summed squared probabilities, but got none")
    with torch.no_grad():
        mean = policy.mean_logps - policy.collisions.float() / policy.lengths
        weights = torch.exp(mean)
        return weights[0::2] * weights[1::2]


def nll(policy: ResponseLogps, *, with_prompt: bool = False) -> Tensor:
    """Negative log-likelihood of the chosen responses, (P,) nats per token: a mean over its own tokens, and
    over its prompt's ``with_prompt``. Raises ValueError where the prompts' log-probabilities are missing."""
    if not with_prompt:
        return -policy.mean_logps[0::2]
    if policy.prompt_sums is None or policy.prompt_counts is None:
        raise ValueError("a likelihood of the prompt needs its tokens' log-probabilities, but got none")
    sums = policy.sums if policy.plain_sums is None else policy.plain_sums
    both = sums.float() + policy.prompt_sums.float()
    return -(both / (policy.lengths + policy.prompt_counts.float()))[0::2]
