"""The callback that counts compilations, with a counter and batches made here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_align.engines.base import Graph
from nxdt_align.errors import UserError
from nxdt_align.training import monitors
from nxdt_align.training.monitors import RecompileGuard


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Its warnings."""
    said: list[str] = []
    monkeypatch.setattr(monitors.log, "warning", lambda text, *values: said.append(text % values))
    return said


def batch(*tokens: int) -> list[Any]:
    """Micro-batches of one row each."""
    return [
        SimpleNamespace(input_ids=torch.zeros(1, n), labels=torch.zeros(1, 64), slot_valid=torch.zeros(1, 6))
        for n in tokens
    ]


class Device:
    """A compiler that counts, and names its graphs by the order in which they came: ``0``, ``1``, ..."""

    def __init__(self, *, stop: bool, ahead: set[str] | None = None) -> None:
        self.compiled = 0
        compiler: Any = self
        self.guard = RecompileGuard(compiler, stop=stop, ahead=ahead)
        self.trainer: Any = SimpleNamespace(global_step=0)
        self.module: Any = None

    def count(self) -> int:
        return self.compiled

    def graphs(self) -> dict[str, Graph]:
        return {str(at): Graph(str(at), "training step: loss", ()) for at in range(self.compiled)}

    def step(self, rows: list[Any], compiles: int) -> None:
        self.guard.on_train_batch_start(self.trainer, self.module, rows, 0)
        self.compiled += compiles
        self.trainer.global_step += 1
        self.guard.on_train_batch_end(self.trainer, self.module, None, rows, 0)

    def validate(self, rows: list[Any], compiles: int, index: int = 0) -> None:
        self.guard.on_validation_batch_start(self.trainer, self.module, rows, index)
        self.compiled += compiles
        self.guard.on_validation_batch_end(self.trainer, self.module, None, rows, index)


def test_the_first_two_steps_of_each_shape_may_compile(told: list[str]) -> None:
    device = Device(stop=True)
    for rows in (batch(128), batch(192), batch(128, 128)):
        for compiles in (3, 1, 0, 0):
            device.step(rows, compiles)
    device.compiled += 5  # outside of a step: a checkpoint, the reference pass
    device.validate(batch(128), 1)
    device.validate(batch(128), 1)
    device.step(batch(128), 0)
    assert device.guard.surprises == 0 and told == []


def test_a_surprise_names_the_step_and_its_shapes(told: list[str]) -> None:
    device = Device(stop=False)
    for compiles in (1, 1, 2):
        device.step(batch(128, 128), compiles)
    for compiles in (1, 0, 1):
        device.validate(batch(64), compiles, index=4)
    first, second = told
    assert first.startswith(
        "step 3 compiled 2 graph(s), although 2 batches of its shapes preceded it: 2 micro-batch(es) of "
        "1 row(s) x 128 tokens, 64 response tokens and 6 responses per row."
    )
    assert second.startswith("batch 4 of the validation after step 3 compiled 1 graph(s)")
    assert device.guard.surprises == 3


def test_it_stops_where_the_yaml_says_so() -> None:
    device = Device(stop=True)
    device.step(batch(128), 1)
    device.step(batch(128), 1)
    device.step(batch(128), 0)
    with pytest.raises(UserError, match=r"exp_manager.fail_on_recompile: step 4 compiled 1 graph"):
        device.step(batch(128), 1)


def test_a_graph_that_was_not_compiled_ahead_is_told_at_once(told: list[str]) -> None:
    """Also in the first steps of a shape, whose graphs are no surprise otherwise; each once."""
    device = Device(stop=False, ahead={"0", "1", "3"})
    device.compiled = 1
    device.guard.on_train_start(device.trainer, device.module)
    for compiles in (1, 1, 0):
        device.step(batch(128), compiles)
    device.validate(batch(64), 2)
    assert told == [
        f"{where} needed 1 graph(s) that COMPILE=1 has not compiled ahead (1 of training step: loss): a "
        "setting differs from what it was run with. COMPILE=1 with the same overrides compiles them"
        for where in ("step 2", "batch 0 of the validation after step 3")
    ]


@pytest.mark.parametrize("before_training", [True, False])
def test_it_stops_at_a_graph_that_was_not_compiled_ahead(before_training: bool) -> None:
    device = Device(stop=True, ahead={"0"})
    device.step(batch(128), 1)
    with pytest.raises(UserError, match=r"fail_on_recompile: .* has not compiled ahead .*; False only warns"):
        if before_training:
            device.compiled += 1
            device.guard.on_train_start(device.trainer, device.module)
        device.step(batch(128), 1)
