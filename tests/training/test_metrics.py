"""Throughput over a window, and weighted means, with numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nxdt_align.training.module import Throughput, WeightedMeans


def fetch(values: Sequence[Tensor]) -> list[float]:
    return [float(value) for value in values]


def test_throughput_is_over_the_window_and_keeps_its_peak() -> None:
    """Steps of 8 examples at seconds 1, 2, 6: 8/s, 16/2 = 8/s, then (window of 2) 16/5 = 3.2/s."""
    times = iter([0.0, 1.0, 2.0, 6.0])
    meter = Throughput(window=2, clock=lambda: next(times))
    assert [meter.step(8) for _ in range(3)] == pytest.approx([8.0, 8.0, 3.2])
    assert meter.peak == 8.0


def test_restart_leaves_a_pause_out() -> None:
    times = iter([0.0, 100.0, 101.0])
    meter = Throughput(clock=lambda: next(times))
    meter.restart()
    assert meter.step(4) == pytest.approx(4.0)


def test_means_weigh_a_smaller_last_step_by_its_size() -> None:
    """Means 1 over 4 examples and 4 over 2: (4 + 8) / 6 = 2."""
    means = WeightedMeans()
    means.add({"loss": torch.tensor(1.0)}, torch.tensor(4.0))
    means.add({"loss": torch.tensor(4.0)}, torch.tensor(2.0))
    assert float(means.means(fetch)["loss"]) == 2.0
    assert WeightedMeans().means(fetch) == {}


def test_means_are_fetched_once() -> None:
    """However many steps there were: each transfer would hold the device up."""
    fetched: list[int] = []

    def count(values: Sequence[Tensor]) -> list[float]:
        fetched.append(len(values))
        return fetch(values)

    means = WeightedMeans()
    for loss in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(loss), "nll": torch.tensor(-loss)}, torch.tensor(1.0))
    assert {name: float(value) for name, value in means.means(count).items()} == {"loss": 3.0, "nll": -3.0}
    assert fetched == [9]
