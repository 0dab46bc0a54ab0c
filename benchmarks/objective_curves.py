"""Curves of all objectives in one picture: a panel each, held-out reward accuracy and loss over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMNS = 6
ACCURACY, LOSS = "tab:blue", "tab:orange"


def draw(results: Sequence[Mapping[str, Any]], least: float) -> Figure:
    """``results``: as in the benchmark's JSON; ``least``: the accuracy that each should pass."""
    rows = -(-len(results) // COLUMNS)
    figure = Figure(figsize=(2.1 * min(COLUMNS, len(results)) + 0.6, 1.45 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, min(COLUMNS, len(results)), sharex=True, sharey=True, squeeze=False)
    for panel, result in zip(panels.flat, results, strict=False):
        _panel(panel, result, least)
    for spare in panels.flat[len(results) :]:
        spare.set_axis_off()
    figure.suptitle(
        "Held-out reward accuracy (blue, 0 to 1) and loss (orange, own scale) over steps", fontsize=9
    )
    return figure


def _panel(panel: Axes, result: Mapping[str, Any], least: float) -> None:
    panel.axhline(least, color="0.8", linewidth=0.7, linestyle="--")
    panel.plot(result["steps"], result["accuracies"], color=ACCURACY, linewidth=1.4)
    panel.set_ylim(-0.03, 1.03)
    panel.set_title(f"{result['name']}: {result['accuracy']:.3f}", fontsize=7.5)
    panel.tick_params(labelsize=6)
    own = panel.twinx()
    own.plot(result["loss_steps"], result["losses"], color=LOSS, linewidth=0.9)
    own.set_yticks([])
    for axes in (panel, own):
        axes.spines[["top", "right"]].set_visible(False)


def save(results: Sequence[Mapping[str, Any]], least: float, path: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "objectives"  # the same curves give the same file
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(results, least).savefig(path, dpi=75)
