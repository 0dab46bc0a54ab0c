"""Shares of a step's phases, with times worked out by hand."""

from __future__ import annotations

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
