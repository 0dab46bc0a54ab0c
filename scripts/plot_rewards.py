#!/usr/bin/env python3
"""Draws a run's rewards and reward accuracy, step by step, from its TensorBoard log.

scripts/plot_rewards.py EXPERIMENT_FOLDER [--out docs/demo_rewards.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CHOSEN, REJECTED, ACCURACY = "rewards/chosen", "rewards/rejected", "rewards/accuracies"

Curve = tuple[list[int], list[float]]
"""Steps and values, of equal length, in step order."""


def read_curves(folder: Path, tags: Sequence[str]) -> dict[str, Curve]:
    """The logged scalars of the newest event file under `folder`.

    Raises:
        ValueError: there is no event file, or it lacks one of `tags`.
    """
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder} holds no TensorBoard log (events.out.tfevents.*)")
    log = EventAccumulator(str(files[-1]), size_guidance={"scalars": 0})
    log.Reload()
    known = log.Tags()["scalars"]
    missing = [tag for tag in tags if tag not in known]
    if missing:
        raise ValueError(
            f"{files[-1]} has no {', '.join(missing)}; it has {', '.join(sorted(known)) or 'nothing'}"
        )
    return {tag: ([e.step for e in log.Scalars(tag)], [e.value for e in log.Scalars(tag)]) for tag in tags}


def draw(curves: dict[str, Curve], title: str) -> Figure:
    """Rewards above, accuracy below, over one step axis."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    rewards, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    rewards.plot(*curves[CHOSEN], label="chosen", color="tab:green")
    rewards.plot(*curves[REJECTED], label="rejected", color="tab:red")
    rewards.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    rewards.set(title=title, ylabel="reward")
    rewards.legend(frameon=False)
    accuracy.plot(*curves[ACCURACY], color="tab:blue")
    accuracy.set(xlabel="step", ylabel="reward accuracy", ylim=(0, 1.05))
    for axes in (rewards, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw a run's rewards from its TensorBoard log.")
    parser.add_argument("folder", type=Path, help="experiment folder, e.g. nemo_experiments/<name>/<date>")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/demo_rewards.png"), help="the picture, .png or .svg"
    )
    parser.add_argument("--title", default="Training batches: reward of chosen and rejected answers")
    options = parser.parse_args(arguments)
    try:
        curves = read_curves(options.folder, (CHOSEN, REJECTED, ACCURACY))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    matplotlib.rcParams["svg.hashsalt"] = "rewards"  # the same curves give the same file
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, options.title).savefig(options.out, dpi=120)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
