"""Curves as SVG text for a page, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nxdt_align.evaluation.curves import Curve

COLOURS = ("#1f6feb", "#cf4a1f", "#1a7f37", "#8250df", "#9a6700", "#0e7490", "#bf3989", "#57606a")
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.hashsalt": "nxdt-align",  # the same ids for the same plot
}
_BINS = 24
_MOST_POINTS = 600
"""Of a curve; a longer one is thinned out, as no more can be seen."""


@dataclass(frozen=True)
class Line:
    curve: Curve
    label: str
    colour: str
    is_dashed: bool = False


def plot(title: str, lines: Sequence[Line], name: str) -> str:
    """An SVG element with the lines over the optimizer's steps; empty where no line has a point.

    ``name``: of the plot within its page, of letters.
    """
    shown = [line for line in lines if line.curve]
    if not shown:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for line in shown:
            steps, values = _thinned(line.curve)
            axes.plot(
                steps,
                values,
                # matplotlib reads $ as mathematics and leaves labels with _ out.
                label=line.label.replace("$", r"\$").lstrip("_"),
                color=line.colour,
                linewidth=1.4,
                linestyle="--" if line.is_dashed else "-",
                marker="o" if len(steps) <= 12 else None,
                markersize=3,
            )
        _dress(axes, title)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        if len(shown) > 1 or shown[0].label:
            axes.legend(frameon=False, fontsize=8)
        return _embedded(_svg(figure), title, name)


def histogram(title: str, values: Mapping[str, Sequence[float]], name: str) -> str:
    """An SVG element with how often values occur, of several sets over each other by their labels.

    ``name``: as for ``plot``.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for colour, label in zip(COLOURS, values, strict=False):
            bins = _bins([each for of_set in values.values() for each in of_set])
            axes.hist(values[label], bins=bins, color=colour, alpha=0.55, label=label)
        _dress(axes, title)
        if len(values) > 1:
            axes.legend(frameon=False, fontsize=8)
        return _embedded(_svg(figure), title, name)


def _bins(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    width = (high - low or 1.0) / _BINS
    return [low + width * at for at in range(_BINS + 1)]


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _thinned(curve: Curve) -> tuple[list[int], list[float]]:
    stride = -(-len(curve.steps) // _MOST_POINTS)
    steps, values = list(curve.steps[::stride]), list(curve.values[::stride])
    if steps[-1] != curve.steps[-1]:
        steps.append(curve.steps[-1])
        values.append(curve.values[-1])
    return steps, values


def _embedded(svg: str, title: str, name: str) -> str:
    """The element alone, which scales with the page and whose ids are its own within it."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', element)
    element = re.sub(r'\bhref="#([^"]+)"', rf'href="#{name}-\1"', element)
    element = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", element)
    head, _, rest = element.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{_attribute(title)}">{rest}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
