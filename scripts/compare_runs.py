"""How far apart two runs of the same steps are: loss and gradient norm at each step, and exported weights.

    python scripts/compare_runs.py RUN OTHER [--tolerances LOSS NORM WEIGHTS]

Each figure is relative: of the loss and of the gradient norm to the first run's at that step, of a weight to
the largest entry of the first run's. Status 1 where one is above its tolerance, 2 where the runs cannot be
compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

CURVES = {"loss": "reduced_train_loss", "gradient norm": "gradient_norm"}
FP32, BF16 = (1e-4, 1e-3, 1e-3), (2e-2, 1e-1, 2e-2)
"""Tolerances of loss, gradient norm and weights. Two ways of one sum in float32 are 1e-6 apart, and Adam's
division by a small second moment enlarges that; in bf16 results have 8 bits, in any order."""


class NotComparable(Exception):
    """A run lacks what would be compared; the message says which and what."""


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each of CURVES."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise NotComparable(
            f"{run} has no metrics.jsonl: it is no run's folder, or it ended before its first step"
        )
    text = file.read_text(encoding="utf-8")
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    found = {}
    for name, key in CURVES.items():
        found[name] = [(int(line["step"]), float(line[key])) for line in lines if key in line]
        if not found[name]:
            raise NotComparable(
                f"{run} has logged no {name}; exp_manager.log_gradient_norm=True logs the norm"
            )
    return found


def curve_difference(first: list[tuple[int, float]], second: list[tuple[int, float]]) -> tuple[float, str]:
    """The largest, and where."""
    steps, others = [step for step, _ in first], [step for step, _ in second]
    if steps != others:
        raise NotComparable(f"one run has logged the steps {steps}, the other {others}")
    return max(
        (_finite(abs(a - b) / max(abs(a), 1e-12)), f"step {step}")
        for (step, a), (_, b) in zip(first, second, strict=True)
    )


def weight_difference(first: Path, second: Path) -> tuple[float, str]:
    """The largest, and of which weight."""
    tensors = [_files(run) for run in (first, second)]
    if tensors[0].keys() != tensors[1].keys():
        only = sorted(tensors[0].keys() ^ tensors[1].keys())
        raise NotComparable(f"one export lacks weights that the other has: {', '.join(only[:5])}")
    worst = (0.0, "")
    for name, file in tensors[0].items():
        with safe_open(file, "pt") as one, safe_open(tensors[1][name], "pt") as other:
            a, b = one.get_tensor(name).float(), other.get_tensor(name).float()
        if a.shape != b.shape:
            raise NotComparable(f"{name} is {tuple(a.shape)} in one export and {tuple(b.shape)} in the other")
        worst = max(worst, (_finite(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))), name))
    return worst


def _finite(difference: float) -> float:
    """NaN as infinity: it compares with nothing, so that a maximum would pass over it."""
    return math.inf if math.isnan(difference) else difference


def _files(run: Path) -> dict[str, Path]:
    """Weight -> the file of the export that holds it."""
    found = {}
    for file in sorted((run / "hf_export").glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            found |= dict.fromkeys(held.keys(), file)
    if not found:
        raise NotComparable(f"{run} has no exported weights; exp_manager.export_hf=True exports them")
    return found


def default_tolerances(run: Path) -> tuple[float, float, float]:
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return FP32 if settings.get("precision", {}).get("type") == "fp32" else BF16


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--tolerances", nargs=3, type=float, metavar=("LOSS", "NORM", "WEIGHTS"))
    arguments = parser.parse_args(argv)
    first, second = arguments.runs
    try:
        values, others = curves(first), curves(second)
        found = {name: curve_difference(values[name], others[name]) for name in CURVES}
        found["weights"] = weight_difference(first, second)
    except NotComparable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    allowed = arguments.tolerances or default_tolerances(first)
    status = 0
    for (name, (difference, where)), most in zip(found.items(), allowed, strict=True):
        agrees = difference <= most
        status = status if agrees else 1
        said = "ok" if agrees else "NO"
        print(f"{name:<14} {difference:8.1e} apart at most ({where}); allowed {most:g}: {said}")
    return status


if __name__ == "__main__":
    sys.exit(main())
