"""Pairs per second of one version of this package against another, in turns on the same pairs.

    python benchmarks/versions.py OLD_CHECKOUT [--data FILE|hh|chat] [--model 24m|100m|1b] [--rounds N]

Each version has a process of its own, with its own sources and its own ``contenders.py``. In each round both
get the same pairs, one after the other, and who comes first alternates. Ratios are medians of each round's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent


def serve(arguments: argparse.Namespace) -> None:
    """One version: reads a list of pairs a line, answers with seconds of training and of a reference pass."""
    import bench
    import numpy as np
    import torch
    from bench import CLOCKS, STANDARD, _timed
    from contenders import NAMES, build
    from workload import MODELS, load_workload

    bench.clock = CLOCKS[arguments.clock]
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    path, batch = STANDARD.get(arguments.data, (Path(arguments.data), 8))
    workload = load_workload(path.stem, Path(arguments.file or path), batch, arguments.cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contender = build(arguments.contender or NAMES[0], workload, MODELS[arguments.model], device)
    order = np.random.default_rng(1).permutation(len(workload.examples))
    print(json.dumps({"ready": len(order)}), flush=True)
    for line in sys.stdin:
        pairs = np.roll(order, -int(line) * batch)[:batch].tolist()
        losses: list[torch.Tensor] = []
        precompute = _timed(lambda: contender.precompute(pairs), device)  # noqa: B023 (called at once)
        train = _timed(lambda: losses.append(contender.train(pairs)), device)  # noqa: B023 (called at once)
        print(json.dumps({"precomputed": precompute, "trained": train, "loss": float(losses[0])}), flush=True)


class Version:
    def __init__(self, checkout: Path, rest: Sequence[str]) -> None:
        folders = os.pathsep.join(str(checkout / name) for name in ("src", "benchmarks"))
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "versions.py"), "--serve", *rest],
            env={**os.environ, "PYTHONPATH": folders},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a version ended with {self._process.wait()}; its message stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def round(self, number: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        return self._read()


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", nargs="?", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--data", default="hh", help="file of pairs, or hh or chat of ../shared/data")
    parser.add_argument("--model", default="24m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contender", default="", help="of contenders.py (default: ours, shared_prompt)")
    parser.add_argument("--clock", default="wall", help="cpu: one thread, its CPU time, for a busy machine")
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="tokenizers and tokens")
    parser.add_argument("--file", default="", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if not found.serve and found.old is None:
        parser.error("the checkout of the version to compare with is missing")
    return found, [a for a in sys.argv[1:] if found.old is None or a != str(found.old)]


def main() -> int:
    arguments, rest = _arguments()
    if arguments.serve:
        # Python puts this script's own folder first: the checkout's benchmarks are to be found.
        sys.path.remove(str(HERE))
        serve(arguments)
        return 0
    sys.path.insert(0, str(HERE))
    from bench import STANDARD

    # An old checkout elsewhere does not have the shared data beside it.
    path = STANDARD.get(arguments.data, (Path(arguments.data), 8))[0].resolve()
    rest += ["--file", str(path)]
    versions = [Version(arguments.old, rest), Version(HERE.parent, rest)]
    ratios: dict[str, list[float]] = {"trained": [], "precomputed": []}
    for number in range(arguments.rounds + 1):
        order = (0, 1) if number % 2 else (1, 0)
        found = {which: versions[which].round(number) for which in order}
        losses = found[0]["loss"], found[1]["loss"]
        if abs(losses[0] - losses[1]) > 1e-3 * max(1.0, *map(abs, losses)):
            raise SystemExit(f"round {number}: the versions' losses differ, {losses}")
        if number == 0:
            continue  # warms up
        for what, values in ratios.items():
            values.append(found[0][what] / found[1][what])
    for what, values in ratios.items():
        spread = f"{median(values):.3f} times the old version ({min(values):.3f} to {max(values):.3f})"
        print(f"{arguments.data} {arguments.model} {what}: {spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
