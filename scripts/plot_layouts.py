#!/usr/bin/env python3
"""Draws who sees whom in each layout of rows, from rows that the package's own collator lays out.

scripts/plot_layouts.py [--out docs/layouts.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.colors
import matplotlib.patches
import numpy as np
import torch
from matplotlib.figure import Figure

from nxdt_align.batch import Batch, SlotRole
from nxdt_align.data.collate import Collator, GlobalCounts
from nxdt_align.data.packing import Bucket, Layout, example_tokens
from nxdt_align.data.tokenize import Example
from nxdt_align.ops.attention import visibility

WINDOW = 4
ROLES = (SlotRole.CHOSEN, SlotRole.REJECTED)
PADDING, PROMPT, CHOSEN, REJECTED = range(4)
COLOURS = ("#dddddd", "#4c72b0", "#55a868", "#c44e52")
NAMES = ("padding", "prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Panel:
    title: str
    layout: Layout
    window: int | None = None


PANELS = (
    Panel("none: a row per response", "none"),
    Panel("packed: each response after its own prompt", "packed"),
    Panel("shared_prompt: the chosen response reversed,\nbefore the prompt", "shared_prompt"),
    Panel(f"a window of {WINDOW}: the example is longer,\nso it is laid as packed", "shared_prompt", WINDOW),
)


class _Lengths:
    def __init__(self, examples: Sequence[Example]) -> None:
        self.prompt_lengths = np.array([len(e.prompt) for e in examples])
        self.response_lengths = np.array([[len(r) for r in e.responses] for e in examples])


def pair() -> Example:
    """A prompt of 4 tokens, 10 to 13; a chosen response of 4, 20 to 23; a rejected one of 3, 30 to 32. A
    token's kind is its first digit."""
    chosen, rejected = np.arange(20, 24, dtype=np.int32), np.arange(30, 33, dtype=np.int32)
    return Example("00" * 16, np.arange(10, 14, dtype=np.int32), (chosen, rejected))


def lay_out(panel: Panel) -> Batch:
    """The pair's row, or rows, with two tokens of padding."""
    example = pair()
    tokens = int(example_tokens(_Lengths([example]), panel.layout, panel.window)[0]) + 2
    collator = Collator([example], panel.layout, ROLES, window=panel.window)
    slots = 1 if panel.layout == "none" else 2
    return collator([[0]], Bucket(tokens, 8, slots), GlobalCounts(1, 7))


def kinds(batch: Batch) -> list[list[int]]:
    """What each token belongs to; a response's copy of the prompt's last token is the response's."""
    found = []
    for row in range(batch.num_rows):
        ids = batch.input_ids[row].tolist()
        of_row = [
            PADDING if token == 0 else {1: PROMPT, 2: CHOSEN, 3: REJECTED}[token // 10] for token in ids
        ]
        for at, label in zip(batch.response_positions[row].tolist(), batch.labels[row].tolist(), strict=True):
            if label >= 20:
                of_row[at] = CHOSEN if label < 30 else REJECTED
        found.append(of_row)
    return found


def texts(batch: Batch) -> list[list[str]]:
    letter = {1: "p", 2: "c", 3: "r"}
    return [["" if t == 0 else f"{letter[t // 10]}{t % 10}" for t in row] for row in batch.input_ids.tolist()]


def draw() -> Figure:
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    colours = matplotlib.colors.ListedColormap(["white", *COLOURS])
    for axis, panel in zip(axes, PANELS, strict=True):
        batch = lay_out(panel)
        start = batch.key_start
        if panel.window is not None:
            index = torch.arange(start.shape[1], dtype=torch.int32)
            start = torch.maximum(start, index + (1 - panel.window))
        seen = visibility(start, batch.key_stop)
        rows, size = start.shape
        # Rows one after the other, as they stand in a batch.
        whole = np.zeros((rows * size, rows * size), np.int64)
        names = [text for row in texts(batch) for text in row]
        for row, of_row in enumerate(kinds(batch)):
            block = np.where(seen[row].numpy(), 1 + np.array(of_row)[None, :], 0)
            whole[row * size : (row + 1) * size, row * size : (row + 1) * size] = block
        axis.imshow(whole, cmap=colours, vmin=0, vmax=len(COLOURS))
        axis.set_title(panel.title, fontsize=10)
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xticks(np.arange(-0.5, len(names)), minor=True)
        axis.set_yticks(np.arange(-0.5, len(names)), minor=True)
        axis.grid(which="minor", color="#eeeeee", linewidth=0.5)
        axis.tick_params(which="both", length=0)
        for row in range(1, rows):
            axis.axhline(row * size - 0.5, color="black", linewidth=0.8)
            axis.axvline(row * size - 0.5, color="black", linewidth=0.8)
    axes[0].set_ylabel("query")
    figure.supxlabel("key: one stretch of each query's row", fontsize=10)
    patches = [
        matplotlib.patches.Patch(color=COLOURS[kind], label=NAMES[kind])
        for kind in (PROMPT, CHOSEN, REJECTED)
    ]
    figure.legend(handles=patches, loc="lower right", ncols=3, fontsize=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/layouts.png", help="picture to write")
    draw().savefig(parser.parse_args(arguments).out, dpi=110)


if __name__ == "__main__":
    main()
