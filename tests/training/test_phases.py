"""Shares of a step's phases, with times worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_align.training.module import AlignmentModule, TrainingSettings
from nxdt_align.training.phases import Phases


def test_shares_and_newest() -> None:
    """Two steps: 1 s of data in the second, 2 and 4 s forward and backward, 1 s optimizer each, 1 s metrics
    in the second. 10 s in all. A wait that is begun anew does not count what was before."""
    times = iter([0, 2, 2, 3, 3, 5, 6, 6, 10, 10, 11, 11, 12])
    phases = Phases(clock=lambda: float(next(times)))
    assert phases.summary() == ""
    phases.begin_step()
    with phases.during("forward_backward"):
        pass
    with phases.during("optimizer"):
        pass
    phases.wait()  # at 3, and again at 5: a validation came between
    phases.wait()
    phases.begin_step()  # at 6
    for phase in ("forward_backward", "optimizer", "metrics"):
        with phases.during(phase):  # type: ignore[arg-type]
            pass
    assert phases.newest == {"data": 1.0, "forward_backward": 4.0, "optimizer": 1.0, "metrics": 1.0}
    said = phases.summary()
    assert said.startswith("2 steps of 5.000 s: waiting for data 10%, forward and backward 60%, ")
    assert "clipping and optimizer 20%, metrics and logging 10% (the host's times)" in said


def test_the_device_is_waited_for_where_asked() -> None:
    waits: list[int] = []
    phases = Phases(lambda: waits.append(1))
    with phases.during("optimizer"):
        pass
    assert waits == [1]


@pytest.mark.parametrize(("lazy", "told"), [(True, "the host's times"), (False, "waiting for the device")])
def test_a_lazy_device_is_not_said_to_be_waited_for(
    caplog: pytest.LogCaptureFixture, lazy: bool, told: str
) -> None:
    """Its step is one graph: only the host's times, of recording it, can be told apart."""
    caplog.set_level("INFO", logger="nxdt_align")
    none: Any = None
    engine: Any = SimpleNamespace(lazy=lazy, device=torch.device("cpu"))
    settings = TrainingSettings(
        gradient_clip_val=None,
        log_every_n_steps=1,
        log_parameter_norm=False,
        log_gradient_norm=False,
        log_step_phases=True,
    )
    module = AlignmentModule(engine, none, none, settings, none)
    module.say_phases()
    assert not caplog.messages, "no step has been taken"
    module._phases.begin_step()
    with module._phases.during("optimizer"):
        pass
    module.say_phases()
    (line,) = caplog.messages
    assert line.startswith("1 steps of ") and told in line
