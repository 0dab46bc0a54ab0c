"""A step of a family's model on engine nxd, and how far it is off the plain model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nxd_fixture import (
    Case,
    batches_of,
    examples,
    gradients_of,
    objective,
    one_copy,
    plain,
    start,
    weights,
    whole,
)
from oracle import dpo_loss, gradients, orpo_loss

from nxdt_align.models.presets import DecoderConfig

ROW = 75
"""Tokens that two ranks do not divide."""


def step(case: Case, config: DecoderConfig, loss: str) -> dict[str, Any]:
    """On a rank: loss, gradients and their norm."""
    built = start(case, config)
    if loss == "dpo":
        built.load_reference(weights(1, config))
    output = built.step(batches_of(built, "shared_prompt", ROW), objective(loss))
    found = gradients_of(built)
    return {"loss": output.loss, "gradients": found, "norm": built.clip_gradients(0.1)}


def expected(config: DecoderConfig, loss: str) -> tuple[Any, dict[str, Any]]:
    """The plain model's loss and gradients."""
    model = plain(0, config)
    pairs = examples().examples
    wanted = dpo_loss(model, plain(1, config), pairs, 0.1) if loss == "dpo" else orpo_loss(model, pairs, 0.1)
    return wanted.detach(), gradients(wanted, model)


def off_the_plain_model(
    case: Case, config: DecoderConfig, loss: str, ranks: Sequence[dict[str, Any]]
) -> float:
    """The largest of the loss's relative difference, which is at most 2e-6, and of the gradients', each of
    its weight's largest."""
    wanted, wanted_gradients = expected(config, loss)
    off = max(float((rank["loss"] - wanted).abs()) / max(1.0, float(wanted)) for rank in ranks)
    assert off <= 2e-6, f"loss {off:.1e}"
    for copy in range(case.dp):
        got = whole(case, config, [rank["gradients"] for rank in one_copy(case, ranks, copy)])
        for key, gradient in wanted_gradients.items():
            off = max(off, float((got[key] - gradient).abs().max() / gradient.abs().max()))
    return off
