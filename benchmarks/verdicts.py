"""Precision and recall of the verdict's rules, on short runs made to be good or bad in known ways.

    python benchmarks/verdicts.py [--only WORDS] [--steps N] [--jobs N] [--reuse] [--page PAGE]

Each case of ``verdict_cases.py`` is trained by ``nxdt-align train`` from one shared warm-up, and its verdict
compared with what the run was made to show. Prints a table of rules and one of cases, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from objective_runs import CONF, RUN, Bench, make_data, train, warmup_config, with_places
from objectives import split_page
from omegaconf import OmegaConf
from verdict_cases import CASES, RULES, Case, write_data

from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write

MARKS = ("<!-- results -->", "<!-- end of results -->")
STEPS, WARMUP_STEPS = 120, 1200
POINTS = 8
"""Validations of a run."""


@dataclass(frozen=True)
class Found:
    """What the verdict on one case's run says."""

    case: Case
    rules: frozenset[str]
    summary: str
    seconds: float

    @property
    def missed(self) -> list[str]:
        return sorted(self.case.shows - self.rules)

    @property
    def wrong(self) -> list[str]:
        return sorted(self.rules - self.case.shows - self.case.open)


@dataclass(frozen=True)
class Score:
    """A rule's, over all cases that judge it."""

    rule: str
    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float | None:
        found = self.right + self.wrong
        return self.right / found if found else None

    @property
    def recall(self) -> float | None:
        there = self.right + self.missed
        return self.right / there if there else None


def scores(found: Sequence[Found]) -> list[Score]:
    """One per rule, in the rules' order."""
    return [
        Score(
            rule,
            sum(rule in each.rules & each.case.shows for each in found),
            sum(rule in each.wrong for each in found),
            sum(rule in each.missed for each in found),
        )
        for rule in RULES
    ]


def tables(found: Sequence[Found]) -> str:
    """Markdown: rules, then cases."""
    rows = [("rule", "runs that show it", "found", "missed", "found wrongly", "precision", "recall")]
    rows.append(("---",) * 7)
    for score in scores(found):
        counts = (score.right + score.missed, score.right, score.missed, score.wrong)
        rows.append((score.rule, *map(str, counts), _share(score.precision), _share(score.recall)))
    good = [each for each in found if not each.case.shows]
    clean = sum(not each.wrong for each in good)
    lines = [_row(row) for row in rows]
    lines += ["", f"{clean} of {len(good)} good runs have no finding that they should not have.", ""]
    head = ("run", "made to show", "found", "summary")
    lines += [_row(head), _row(("---",) * 4)]
    for each in found:
        shown = ", ".join(sorted(each.case.shows)) or "nothing"
        mark = "" if not (each.missed or each.wrong) else " (!)"
        lines.append(
            _row((each.case.name, shown, (", ".join(sorted(each.rules)) or "nothing") + mark, each.summary))
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# The runs


def config_of(case: Case, bench: Bench, other: Path) -> Any:
    """The demo's DPO config with the case's settings and data; ``other`` is a reference of its own."""
    config = OmegaConf.load(CONF / "tiny_llama_DPO_config.yaml")
    steps = max(8, int(bench.steps * case.steps))
    config.exp_manager.resume_from_checkpoint = str(bench.start)
    config.model.optim.sched.warmup_steps = max(1, steps // 10)
    train_file, heldout = write_data(bench.demo / "data", case.data)
    config.data.train_dir, config.data.val_dir = str(train_file), str(heldout)
    if case.reference:
        config.model_alignment_strategy.reference_model = str(other)
    config = with_places(config, place(case, bench), steps, POINTS)
    config.exp_manager.checkpoint_callback_params.update({"every_n_train_steps": 10**6, "save_top_k": 1})
    config.exp_manager.export_hf = False
    # What all runs share, as a sweep's do.
    config.exp_manager.exp_dir = str(bench.folder / "experiments")
    for key, value in case.settings.items():
        OmegaConf.update(config, key, value, force_add=True)
    return config


def place(case: Case, bench: Bench) -> Path:
    return bench.folder / "runs" / "".join(c if c.isalnum() or c in ".-" else "_" for c in case.name)


def judge(case: Case, bench: Bench, other: Path, reuse: bool) -> Found:
    """Train and read the report; with ``reuse``, that of an earlier run of the same config."""
    folder, config = place(case, bench), config_of(case, bench, other)
    kept = folder / "seconds.json"
    if not (reuse and kept.is_file() and OmegaConf.load(folder / "config.yaml") == config):
        try:
            seconds = train(config, folder, bench)
        except UserError as error:
            # A policy in ruins may end in values that are not finite: its report is written by hand then.
            print(f"{case.name}: {str(error).splitlines()[-1]}", file=sys.stderr)
            seconds = 0.0
        atomic_write(kept, json.dumps(seconds).encode())
    from nxdt_align.run.report import summary

    (run,) = summary([folder / RUN])["runs"]
    rules = frozenset(finding["rule"] for finding in run["verdict"]["findings"])
    found = Found(case, rules, run["verdict"]["summary"], json.loads(kept.read_text()))
    marks = "".join(f"; missed {rule}" for rule in found.missed) + "".join(
        f"; wrong {r}" for r in found.wrong
    )
    print(f"{case.name}: {', '.join(sorted(rules)) or 'nothing'}{marks}", file=sys.stderr, flush=True)
    return found


def measure(cases: Sequence[Case], bench: Bench, jobs: int, reuse: bool) -> list[Found]:
    half = replace(bench, warmup_steps=max(1, bench.warmup_steps // 2))
    for each in (bench, half):
        if not (reuse and each.start.is_dir()):
            if each is bench or not (bench.demo / "data").is_dir():
                make_data(bench)
            train(warmup_config(each), each.warmup, each)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda case: judge(case, bench, half.start, reuse), cases))


def chosen_cases(only: str) -> list[Case]:
    """Those whose names have one of the words between semicolons. Raises UserError where there is none."""
    words = [word.strip() for word in only.split(";") if word.strip()]
    found = [case for case in CASES if not words or any(word in case.name for word in words)]
    if not found:
        raise UserError(
            f"--only: no case has {only!r} in its name; there are {'; '.join(c.name for c in CASES)}"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose names have one of these, parted by ';'")
    parser.add_argument("--steps", type=int, default=STEPS, help="of most runs (default: %(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=WARMUP_STEPS, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--reuse", action="store_true", help="keep the warm-up and runs of equal configs")
    parser.add_argument("--folder", type=Path, default=Path("build/verdicts"), help="of all runs")
    parser.add_argument("--page", type=Path, help="also write the tables into this page, between its marks")
    options = parser.parse_args(arguments)
    try:
        if min(options.steps, options.warmup_steps, options.jobs) < 1:
            raise UserError("--steps, --warmup-steps and --jobs must be at least 1")
        cases = chosen_cases(options.only)
        around = split_page(options.page) if options.page else ("", "")
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
        bench = Bench(options.folder.absolute(), options.steps, options.warmup_steps, threads)
        found = measure(cases, bench, options.jobs, options.reuse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = tables(found)
    print(text)
    rows = [
        {
            "run": f.case.name,
            "shows": sorted(f.case.shows),
            "open": sorted(f.case.open),
            "found": sorted(f.rules),
        }
        for f in found
    ]
    atomic_write(bench.folder / "result.json", (json.dumps(rows, indent=1) + "\n").encode())
    if options.page:
        page = f"{around[0]}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{around[1]}"
        atomic_write(options.page, page.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
