"""What every objective made of the same data, in one picture: drawn from the benchmark's table, so that both
say the same.

    PYTHONPATH=src:examples:benchmarks python benchmarks/objective_picture.py docs/objectives_benchmark.md
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from objective_settings import ENTRIES

REWARDS = {"log-ratio": "tab:blue", "log p": "tab:orange", "log p a token": "tab:green"}
_BEFORE = re.compile(r"^The warm-up: ([\d.]+)% of the completions right", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """Of the table."""

    name: str
    reward: str
    right: float
    """Percent of the completions."""
    gap: float
    """By how much the implied reward prefers chosen responses, nats: the margin without its beta."""


def read_table(text: str) -> tuple[float, list[Row]]:
    """Percent of the warm-up's completions that are right, and a row per objective, the best last.

    Raises ValueError where ``text`` has no such table.
    """
    scales = {entry.name: entry.scale for entry in ENTRIES}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    before = _BEFORE.search(text)
    rows = [
        Row(each[0], each[2], float(each[6].rstrip("%")), float(each[5]) / scales[each[0]])
        for each in cells
        if len(each) == 9 and each[0] in scales
    ]
    if before is None or not rows:
        raise ValueError("no table of objectives, or no line on the warm-up below it")
    return float(before[1]), sorted(rows, key=lambda row: (row.right, row.gap))


def draw(text: str) -> Figure:
    """Points per objective: right completions, and how far chosen and rejected responses are apart."""
    before, rows = read_table(text)
    figure = Figure(figsize=(9.4, 0.235 * len(rows) + 1.1), layout="constrained")
    right, gap = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    right.axvline(before, color="0.5", linewidth=1, linestyle="--")
    right.annotate(f" warm-up, {before:.0f}%", (before, len(rows) - 0.6), color="0.35", fontsize=8)
    for reward, colour in REWARDS.items():
        some = [(place, row) for place, row in enumerate(rows) if row.reward == reward]
        places = [place for place, _ in some]
        rights = [row.right for _, row in some]
        right.hlines(places, before, rights, color=colour, linewidth=1.5, alpha=0.35)
        right.plot(rights, places, "o", color=colour, markersize=5, label=reward.replace(" a ", " per "))
        gap.plot([row.gap for _, row in some], places, "o", color=colour, markersize=5)
    right.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    right.set_ylim(-0.7, len(rows) + 0.2)
    right.set_xlabel("right held-out completions, % (greedy)", fontsize=8.5)
    gap.set_xlabel("chosen over rejected, nats (margin / beta)", fontsize=8.5)
    gap.axvline(0, color="0.5", linewidth=1)
    right.legend(title="implied reward", loc="lower right", fontsize=8, title_fontsize=8, frameon=False)
    for axes in (right, gap):
        axes.grid(axis="x", color="0.9")
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(text).savefig(path, dpi=100)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    save(page.read_text(encoding="utf-8"), page.with_suffix(".png"))
