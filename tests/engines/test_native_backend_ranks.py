"""Models that transformers computes, over two data-parallel processes."""

from __future__ import annotations

from pathlib import Path

import backend_ranks
import pytest
import torch
from backend_fixture import config_of, dpo_loss, drawn
from layouts import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from oracle import assert_gradients_close, random_examples
from rank_processes import run_parallel


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("deepseek_v3", "fsdp"),
        ("gpt2", "zero1"),
        *(pytest.param(n, k, marks=pytest.mark.full) for n in ("phi", "mixtral") for k in ("fsdp", "none")),
    ],
)
def test_two_ranks_equal_one_response_at_a_time(name: str, kind: str, tmp_path: Path) -> None:
    config = config_of(name)
    model, reference = drawn(config, 0), drawn(config, 1)
    loss = dpo_loss(model, reference, random_examples(6, 1), backend_ranks.BETA)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = {
        n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)
    }
    for rank in run_parallel(2, backend_ranks.step, name, kind, tmp_path):
        assert abs(rank["loss"] - float(loss)) <= LOSS_TOLERANCE * abs(float(loss))
        assert_gradients_close(rank["gradients"], wanted, GRADIENT_TOLERANCE)
        assert rank["is_same"]
        assert rank["is_divided"] == (kind != "none")
