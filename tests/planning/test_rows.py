"""What is said of the rows before training, counted by hand."""

from __future__ import annotations

import numpy as np
from row_plans import FakeLengths, planner

from nxdt_align.planning.rows import PlanReport


def test_report_of_a_plan_counted_by_hand() -> None:
    """Two pairs of 9 positions each in one row of 64: 18 of 64 positions hold a token, where layout none has
    4 rows of 100."""
    data = FakeLengths(np.array([5, 5]), np.array([[3, 2], [3, 2]]))
    report = PlanReport.measure(planner(data, "shared_prompt"), 2, 8, 100)
    assert (report.rows, report.tokens, report.positions, report.padded) == (1, 18, 64, 400)
    assert "fill: 28.1% (18 tokens in 64 positions)" in str(report)
    assert "packing saves 84% of the 400 padded tokens (6.2x fewer)" in str(report)


def test_report_counts_empty_rows() -> None:
    """One row for two pairs, and three empty ones for a pipeline of four stages."""
    data = FakeLengths(np.array([5, 5]), np.array([[3, 2], [3, 2]]))
    report = PlanReport.measure(planner(data, "shared_prompt", min_micro_batches=4), 2, 8, 100)
    assert (report.rows, report.empty_rows) == (4, 3)
    assert "4 rows per step over all ranks (3.0 empty)" in str(report)
