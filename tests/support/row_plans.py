"""Lengths of a made-up data set, and a row planner of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nxdt_align.data.packing import Layout, RowPlanner

LAYOUTS: list[Layout] = ["none", "packed", "shared_prompt"]


@dataclass
class FakeLengths:
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray


def lengths(count: int = 100, seed: int = 0, responses: int = 2) -> FakeLengths:
    rng = np.random.default_rng(seed)
    return FakeLengths(rng.integers(1, 60, count), rng.integers(1, 40, (count, responses)))


def planner(data: FakeLengths, layout: Layout, **options: object) -> RowPlanner:
    settings: dict[str, object] = {"examples_per_step": 8, "seq_length": 100, **options}
    return RowPlanner(data, layout, **settings)  # type: ignore[arg-type]
