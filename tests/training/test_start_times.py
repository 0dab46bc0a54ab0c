"""The parts of a start, timed: which there are, in which order, and nothing where they are not asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_fixture import Project

from nxdt_align.training.monitors import StartTimes

KEY = "exp_manager.enable_recovery_time_instrumentation=True"


def test_a_part_counts_from_the_end_of_the_one_before(caplog: pytest.LogCaptureFixture) -> None:
    times: Iterator[float] = iter([10.0, 11.5, 14.0])
    with caplog.at_level(logging.INFO, logger="nxdt_align"):
        clocked = StartTimes(enabled=True, clock=lambda: next(times))
        clocked.done("a")
        clocked.done("b")
    assert [r.getMessage() for r in caplog.records] == [
        "start: a: 1.50 s (1.50 s so far)",
        "start: b: 2.50 s (4.00 s so far)",
    ]


def test_parts_of_a_start_and_of_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project = Project.create(tmp_path)
    found = []
    for steps, overrides in ((2, [KEY]), (4, [KEY]), (6, [])):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="nxdt_align"):
            assert project.train(f"trainer.max_steps={steps}", "trainer.limit_val_batches=0", *overrides) == 0
        found.append(re.findall(r"start: (.+): [\d.]+ s \(", caplog.text))
    shared = ["processes joined", "data read", "model made"]
    rest = ["reference and optimizer ready", "first step"]
    assert found[0] == [*shared, "start weights loaded", "trainer made", *rest]
    assert found[1] == [*shared, "this run looked for", "checkpoint read", *rest]
    assert found[2] == []
