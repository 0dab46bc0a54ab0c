#!/usr/bin/env python3
"""Draws the training loss of two runs of one configuration, and how far they are apart.

scripts/plot_two_runs.py FOLDER FOLDER [--labels nxd native] [--out docs/engines_agree.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LOSS = "reduced_train_loss"
FLOOR = 1e-8
"""Where a difference of 0 is drawn on the logarithmic axis."""


def read_loss(folder: Path) -> dict[int, float]:
    """Step -> loss, over all event files under `folder`: a resumed run has several, the newest counts.

    Raises:
        ValueError: no event file has the training loss.
    """
    found: dict[int, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        log = EventAccumulator(str(file), size_guidance={"scalars": 0})
        log.Reload()
        if LOSS in log.Tags()["scalars"]:
            found |= {event.step: event.value for event in log.Scalars(LOSS)}
    if not found:
        raise ValueError(f"{folder} holds no TensorBoard log with {LOSS}")
    return found


def draw(losses: Sequence[dict[int, float]], labels: Sequence[str]) -> Figure:
    """Both losses above, the size of their difference below."""
    steps = sorted(losses[0].keys() & losses[1].keys())
    apart = [max(FLOOR, abs(losses[0][step] - losses[1][step])) for step in steps]
    figure = Figure(figsize=(7, 5), layout="constrained")
    loss, difference = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for values, label, style in zip(losses, labels, ("-", "o"), strict=True):
        loss.plot(steps, [values[step] for step in steps], style, label=label, markerfacecolor="none")
    loss.set(ylabel="training loss")
    loss.legend(frameon=False)
    difference.semilogy(steps, apart, color="0.3")
    difference.set(xlabel="step", ylabel="difference", ylim=(FLOOR / 2, 1e-4))
    for axes in (loss, difference):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw the training loss of two runs from their logs.")
    parser.add_argument("folders", type=Path, nargs=2, metavar="FOLDER", help="experiment folder")
    parser.add_argument("--labels", nargs=2, default=["nxd", "native"])
    parser.add_argument("--out", type=Path, default=Path("docs/engines_agree.png"), help=".png or .svg")
    options = parser.parse_args(arguments)
    try:
        losses = [read_loss(folder) for folder in options.folders]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    matplotlib.rcParams["svg.hashsalt"] = "runs"  # the same curves give the same file
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(losses, options.labels).savefig(options.out, dpi=120)
    steps = losses[0].keys() & losses[1].keys()
    largest = max(abs(losses[0][step] - losses[1][step]) for step in steps)
    print(f"{options.out}: {len(steps)} steps, largest difference {largest:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
