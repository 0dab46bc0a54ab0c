"""``trainer.accelerator: xla``, and where COMPILE=1 takes its trial steps."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from nxdt_align.build.env import RunEnv
from nxdt_align.build.parts import device
from nxdt_align.config.data import Attention, DataConfig
from nxdt_align.config.schema import Accelerator, Config, TrainerConfig
from nxdt_align.engines.native import xla
from nxdt_align.errors import UserError


def config(accelerator: Accelerator, attention: Attention = "auto") -> Config:
    return replace(
        Config(), trainer=TrainerConfig(accelerator=accelerator), data=DataConfig(attention=attention)
    )


@pytest.fixture(params=[True, False], ids=["with torch_xla", "without"])
def has_torch_xla(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The meta device stands for torch_xla's."""
    monkeypatch.setattr(xla, "is_available", lambda: request.param)
    monkeypatch.setattr(xla, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return bool(request.param)


def test_xla_needs_torch_xla(has_torch_xla: bool) -> None:
    if has_torch_xla:
        assert device(config("xla"), RunEnv()).type == "meta"
        return
    with pytest.raises(UserError, match=r"is xla, but the package torch_xla is not installed.*=cpu"):
        device(config("xla"), RunEnv())


@pytest.mark.parametrize("compile_only", [True, False])
def test_xla_is_one_process(has_torch_xla: bool, compile_only: bool) -> None:
    fault = r"xla runs in one process here, but there are 2 \(WORLD_SIZE\)" if has_torch_xla else "installed"
    with pytest.raises(UserError, match=fault):
        device(config("xla"), RunEnv(world_size=2, compile_only=compile_only))


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_a_trial_compiles_where_it_can(
    has_torch_xla: bool, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    """The run itself stays on the CPU."""
    caplog.set_level(logging.INFO)
    assert device(config(accelerator), RunEnv()).type == "cpu"
    trial = device(config(accelerator), RunEnv(compile_only=True)).type
    assert trial == ("meta" if has_torch_xla else "cpu")
    assert ("torch_xla is not installed, so that the trial steps run" in caplog.text) != has_torch_xla


@pytest.mark.parametrize(
    ("attention", "processes", "why"),
    [("auto", 2, "torch_xla's CPU device runs one process"), ("blocks", 1, "blocks has no static shapes")],
)
def test_a_trial_that_cannot_compile_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    attention: Attention,
    processes: int,
    why: str,
) -> None:
    monkeypatch.setattr(xla, "is_available", lambda: True)
    caplog.set_level(logging.INFO)
    env = RunEnv(world_size=processes, compile_only=True)
    assert device(config("cpu", attention), env).type == "cpu"
    assert f"{why}, so that the trial steps run and nothing is compiled ahead" in caplog.text
