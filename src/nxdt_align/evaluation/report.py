"""A run's report, or several runs' side by side: an HTML file that needs no network, and the same as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nxdt_align import __version__
from nxdt_align.config.start import SAMPLES_FILE
from nxdt_align.evaluation.curves import Curves, read_curves
from nxdt_align.evaluation.page import page_environment
from nxdt_align.evaluation.plots import COLOURS, Line, plot
from nxdt_align.evaluation.settings import Settings, differing, read_settings
from nxdt_align.evaluation.verdict import (
    ACCURACY,
    CHOSEN,
    CHOSEN_LONGER,
    CHOSEN_PER_TOKEN,
    GRADIENT,
    LOSS,
    MARGIN,
    REJECTED,
    REJECTED_LONGER,
    REJECTED_PER_TOKEN,
    VAL_LOSS,
    Verdict,
    judge,
    objective_of,
)
from nxdt_align.files import atomic_write, read_lines
from nxdt_align.messages import LOG_FILE
from nxdt_align.redaction import redact

_TEMPLATE = "report.html.jinja"
_ENTRY = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ (?P<level>[A-Z]+): ", re.MULTILINE)
_DATA = re.compile(r"(train|val)? ?data: ")
_MOST_WARNINGS = 20

# Title, and (metric, its validation's, what the line is called). Of one run's page.
_PLOTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", ((LOSS, "training"), (VAL_LOSS, "validation"))),
    ("Reward accuracy", ((ACCURACY, "training"), (f"val_{ACCURACY}", "validation"))),
    ("Reward margin", ((MARGIN, "training"), (f"val_{MARGIN}", "validation"))),
    ("Rewards", ((CHOSEN, "chosen"), (REJECTED, "rejected"))),
    (
        "Log-probability per token",
        (
            (CHOSEN_PER_TOKEN, "chosen"),
            (REJECTED_PER_TOKEN, "rejected"),
            (f"val_{CHOSEN_PER_TOKEN}", "chosen, validation"),
            (f"val_{REJECTED_PER_TOKEN}", "rejected, validation"),
        ),
    ),
    (
        "Reward accuracy by length",
        ((CHOSEN_LONGER, "chosen is longer"), (REJECTED_LONGER, "rejected is longer")),
    ),
    ("Learning rate", (("lr", ""),)),
    ("Gradient norm", ((GRADIENT, ""),)),
    ("Examples per second", (("throughput", ""),)),
    ("Peak memory, GiB", (("memory/host_gib", "host"), ("memory/device_gib", "device"))),
)
_COMPARABLE = ("Reward accuracy", "Log-probability per token", "Learning rate", "Gradient norm")
"""Plots whose scale does not depend on the objective."""
_METRICS = (
    (LOSS, "training loss"),
    (VAL_LOSS, "validation loss"),
    (ACCURACY, "reward accuracy"),
    (f"val_{ACCURACY}", "reward accuracy, validation"),
    (MARGIN, "reward margin"),
    (f"val_{MARGIN}", "reward margin, validation"),
    (CHOSEN_PER_TOKEN, "chosen, nats per token"),
    (REJECTED_PER_TOKEN, "rejected, nats per token"),
    (GRADIENT, "gradient norm"),
    ("throughput", "examples per second"),
    ("memory/host_gib", "peak host memory, GiB"),
    ("memory/device_gib", "peak device memory, GiB"),
)


Sample = Mapping[str, Any]
_OF_A_SAMPLE = ("step", "prompt", "answer", "before", "completion", "finish_reason", "tokens")


@dataclass(frozen=True)
class RunReport:
    """What is known of one run."""

    name: str
    folder: Path
    objective: str
    curves: Curves
    settings: Settings
    verdict: Verdict
    data: tuple[str, ...]
    """What its log says of its data."""
    warnings: tuple[str, ...]
    samples: tuple[Sample, ...]
    """What the policy answered last during evaluation."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """First and last values of what it has logged."""
        found = ((name, label, self.curves[name]) for name, label in _METRICS)
        return [
            {
                "name": name,
                "label": label,
                "first": curve.values[0],
                "last": curve.last,
                "step": curve.steps[-1],
            }
            for name, label, curve in found
            if curve
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.folder),
            "objective": self.objective or None,
            "steps": self.curves.last_step,
            "verdict": self.verdict.to_dict(),
            "metrics": {
                each["name"]: {k: each[k] for k in ("first", "last", "step")} for each in self.metrics
            },
            "data": list(self.data),
            "warnings": list(self.warnings),
            "samples": [dict(sample) for sample in self.samples],
            "notes": list(self.curves.notes),
        }


def read_run(folder: Path, name: str) -> RunReport:
    """Of a run's folder, whatever state it is in. Raises UserError where it is no folder."""
    curves, settings = read_curves(folder), read_settings(folder)
    data, warnings = _said(folder / LOG_FILE)
    verdict = judge(curves, settings)
    samples = read_samples(folder / SAMPLES_FILE)
    return RunReport(name, folder, objective_of(settings), curves, settings, verdict, data, warnings, samples)


def read_samples(file: Path) -> tuple[Sample, ...]:
    """The newest line of each prompt, in the order of prompts; cut or damaged lines are passed over."""
    newest: dict[int, Sample] = {}
    for line in read_lines(file):
        try:
            row = json.loads(line)
            # Files of earlier versions tell nothing of the reference.
            newest[int(row["index"])] = {key: row[key] for key in _OF_A_SAMPLE} | {
                "reference": row.get("reference")
            }
        except (ValueError, LookupError, TypeError):
            continue
    return tuple(newest[index] for index in sorted(newest))


def write_reports(folders: Sequence[Path], out: Path) -> list[Verdict]:
    """Write the page of one or several runs to ``out``, and the same as JSON beside it (.json).

    Returns each run's verdict. Raises UserError for a folder that is none, OSError where nothing can be
    written.
    """
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    atomic_write(out, render(runs).encode())
    atomic_write(out.with_suffix(".json"), json.dumps(to_dict(runs), indent=2, default=str).encode())
    return [run.verdict for run in runs]


def to_dict(runs: Sequence[RunReport]) -> dict[str, Any]:
    settings = differing([run.settings for run in runs]) if len(runs) > 1 else {}
    return {"runs": [run.to_dict() for run in runs], "settings_that_differ": settings}


def render(runs: Sequence[RunReport]) -> str:
    """The page."""
    objectives = list(dict.fromkeys(run.objective for run in runs))
    plots = _plots_of_one(runs[0]) if len(runs) == 1 else _plots_of_several(runs, len(objectives) == 1)
    return (
        page_environment()
        .get_template(_TEMPLATE)
        .render(
            runs=runs,
            objectives=[name or "unknown" for name in objectives],
            plots=[Markup(svg) for svg in plots if svg],
            colours=COLOURS,
            differing=differing([run.settings for run in runs]) if len(runs) > 1 else {},
            labels=[(name, label) for name, label in _METRICS if any(run.curves[name] for run in runs)],
            version=__version__,
        )
    )


def _plots_of_one(run: RunReport) -> list[str]:
    return [
        plot(
            title,
            [
                Line(run.curves[name], label, COLOURS[at % 2], is_dashed=at > 1)
                for at, (name, label) in enumerate(lines)
            ],
            f"plot{number}",
        )
        for number, (title, lines) in enumerate(_PLOTS)
    ]


def _plots_of_several(runs: Sequence[RunReport], comparable: bool) -> list[str]:
    """The curves of all runs over each other, one metric per plot; validation's where all have one."""
    found = []
    for number, (title, lines) in enumerate(_PLOTS):
        if not comparable and title not in _COMPARABLE:
            continue
        name, label = lines[0]
        if len(lines) > 1 and lines[1][1] == "validation" and all(run.curves[lines[1][0]] for run in runs):
            name, label = lines[1]
        shown = [
            Line(run.curves[name], run.name, COLOURS[at % len(COLOURS)], is_dashed=at >= len(COLOURS))
            for at, run in enumerate(runs)
        ]
        found.append(plot(f"{title}, {label}" if label else title, shown, f"plot{number}"))
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """Of the folders, with as many of the folders above as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _said(file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a run's log says of its data, and its warnings, each once."""
    try:
        text = redact(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return (), ()
    matches = list(_ENTRY.finditer(text))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    entries = [(m["level"], text[m.end() : end].rstrip()) for m, end in zip(matches, ends, strict=True)]
    data = dict.fromkeys(said for _, said in entries if _DATA.match(said))
    warnings = dict.fromkeys(said for level, said in entries if level in ("WARNING", "ERROR"))
    return tuple(data), tuple(list(warnings)[:_MOST_WARNINGS])
