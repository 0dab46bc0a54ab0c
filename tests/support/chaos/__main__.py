"""``make chaos``: everything that befalls runs, files and input, with a table at the end.

Exits with 1 if anything went wrong. A case that did is named, and its folder kept; the same seed makes the
same cases again, but for those that strike at any time.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chaos import cases, fuzz
from chaos.cases import Case, Outcome, Truths


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="chaos-")).absolute()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    begun = time.monotonic()
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    chosen = [
        case
        for case in _cases(arguments, Truths(folder / "truth"))
        if arguments.only in f"{case.group}: {case.name}"
    ]
    outcomes = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        ends = pool.map(lambda numbered: numbered[1].run(folder / f"{numbered[0]:04d}"), enumerate(chosen))
        for number, outcome in enumerate(ends):
            outcomes.append(outcome)
            if outcome.fault:
                print(
                    f"{folder / f'{number:04d}'}: {outcome.group}: {outcome.case}: {outcome.fault}",
                    flush=True,
                )
    print(table(outcomes, time.monotonic() - begun))
    return int(any(outcome.fault for outcome in outcomes))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description="what befalls a run, its files and its input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=90, help="beside those at named moments")
    parser.add_argument("--conversions", type=int, default=10, help="kills of a conversion")
    parser.add_argument("--signals", type=int, default=30)
    parser.add_argument("--disks", type=int, default=30)
    parser.add_argument("--damage", type=int, default=75)
    parser.add_argument("--data", type=int, default=1000, help="fuzzed data files")
    parser.add_argument("--configs", type=int, default=1000, help="fuzzed configurations")
    parser.add_argument("--only", default="", help="cases whose group or name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once")
    parser.add_argument("--keep", help="folder to work in")
    return parser.parse_args(argv)


def _cases(arguments: argparse.Namespace, truths: Truths) -> Iterator[Case]:
    seed = arguments.seed
    yield from cases.kills(truths, seed, arguments.kills)
    yield from cases.conversions(seed, arguments.conversions)
    yield from cases.signals(truths, seed, arguments.signals)
    yield from cases.full_disks(truths, seed, arguments.disks)
    yield from cases.damages(truths, seed, arguments.damage)
    yield from cases.races(truths)
    yield from fuzz.batches("fuzzed data", fuzz.data_files, seed, arguments.data)
    yield from fuzz.batches("fuzzed configuration", fuzz.configurations, seed, arguments.configs)


def table(outcomes: Sequence[Outcome], seconds: float) -> str:
    """One row per group: cases, and what went wrong in how many."""
    rows = ["", "| what | cases | went wrong |", "|---|---|---|"]
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        of_group = [outcome for outcome in outcomes if outcome.group == group]
        faults = Counter(outcome.fault for outcome in of_group if outcome.fault)
        rows.append(f"| {group} | {sum(outcome.inputs for outcome in of_group)} | {sum(faults.values())} |")
    rows.append(f"\n{sum(outcome.inputs for outcome in outcomes)} cases in {seconds / 60:.1f} minutes")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
