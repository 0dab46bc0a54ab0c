"""Every objective on the demo's data: what each makes of the same warm-up in the demo's time.

    python benchmarks/objectives.py [--only NAMES] [--steps N] [--jobs N] [--reuse] [--page PAGE]

Each objective of ``objective_settings.py`` is trained by ``nxdt-align train`` from one shared warm-up, with
the demo's batches and steps, and judged on the held-out pairs by transformers alone (``demo.evaluate``).
Prints a table, writes JSON and draws the table. Exits with 1 where a held-out reward accuracy is not above
MIN_ACCURACY after the full number of steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from demo.evaluate import HuggingFaceModel, Likelihoods, Pair, Rewards, read_pairs
from objective_picture import save
from objective_runs import RUN, Bench, config_of, make_data, train, warmup_config
from objective_settings import ENTRIES, Entry
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nxdt_align.engines.native.checkpoint import NativeCheckpoint, checkpoint_step
from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write
from nxdt_align.weights.names import to_hf

MIN_ACCURACY = 0.8
STEPS, WARMUP_STEPS = 150, 1200
"""The demo's."""
MARKS = ("<!-- results -->", "<!-- end of results -->")


def implied_rewards(entry: Entry, policy: Likelihoods, reference: Likelihoods) -> Rewards:
    """The rewards that the entry's own objective implies, its scale included."""
    scale = entry.scale
    if entry.reward == "log-ratio":
        return Rewards(
            scale * (policy.chosen - reference.chosen), scale * (policy.rejected - reference.rejected)
        )
    if entry.reward == "log p":
        return Rewards(scale * policy.chosen, scale * policy.rejected)
    return Rewards(
        scale * policy.chosen / policy.chosen_tokens, scale * policy.rejected / policy.rejected_tokens
    )


@dataclass(frozen=True)
class Judge:
    """The held-out pairs, and the warm-up's likelihoods of them."""

    pairs: Sequence[Pair]
    before: Likelihoods

    def __call__(self, entry: Entry, folder: Path, seconds: float) -> dict[str, Any]:
        model = HuggingFaceModel(folder / RUN / "hf_export")
        final = model.evaluate(self.pairs)
        start, end = (implied_rewards(entry, p, self.before) for p in (self.before, final.likelihoods))
        steps, accuracies = [0], [start.accuracy]
        for step, weights in _checkpoints(folder):
            model.model.load_state_dict(weights)
            steps.append(step)
            accuracies.append(implied_rewards(entry, model.likelihoods(self.pairs), self.before).accuracy)
        loss_steps, losses = _held_out_loss(folder)
        return {
            "accuracy_before": start.accuracy,
            "accuracy": end.accuracy,
            "margin": end.margin,
            "right": final.share_right,
            "seconds": seconds,
            "steps": steps,
            "accuracies": accuracies,
            "loss_steps": loss_steps,
            "losses": losses,
        }


def _checkpoints(folder: Path) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Step and weights of each of a run's checkpoints, in step order."""
    found = [(checkpoint_step(path), path) for path in (folder / RUN / "checkpoints").iterdir()]
    for step, path in sorted((step, path) for step, path in found if step is not None):
        checkpoint = NativeCheckpoint(path)
        yield step, {to_hf(name): checkpoint.read(name) for name in checkpoint.names()}


def _held_out_loss(folder: Path) -> tuple[list[int], list[float]]:
    log = EventAccumulator(str(folder / RUN), size_guidance={"scalars": 0})
    log.Reload()
    events = log.Scalars("val_loss")
    return [event.step for event in events], [event.value for event in events]


# The whole


def measure(
    entries: Sequence[Entry], bench: Bench, jobs: int, reuse: bool
) -> tuple[float, list[dict[str, Any]]]:
    """Share of the warm-up's completions that are right, and a result an entry."""
    if not (reuse and bench.start.is_dir()):
        make_data(bench)
        _say(f"warm-up, {bench.warmup_steps} steps: {train(warmup_config(bench), bench.warmup, bench):.0f} s")
    pairs = read_pairs(bench.demo / "data")
    start = HuggingFaceModel(bench.start).evaluate(pairs)
    judge = Judge(pairs, start.likelihoods)

    def one(entry: Entry) -> dict[str, Any]:
        return _result(entry, bench, judge, reuse)

    with ThreadPoolExecutor(jobs) as pool:
        return start.share_right, list(pool.map(one, entries))


def _result(entry: Entry, bench: Bench, judge: Judge, reuse: bool) -> dict[str, Any]:
    """Train and judge one entry; with ``reuse``, what an earlier run of the same config found."""
    folder, config = bench.place(entry), config_of(entry, bench)
    kept = folder / "result.json"
    if not (reuse and kept.is_file() and OmegaConf.load(folder / "config.yaml") == config):
        figures = judge(entry, folder, train(config, folder, bench))
        shutil.rmtree(folder / RUN / "checkpoints")
        atomic_write(kept, json.dumps(figures).encode())
    result = {**asdict(entry), **json.loads(kept.read_text())}
    _say(f"{entry.name}: accuracy {result['accuracy']:.3f}, {result['seconds']:.0f} s")
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


HEAD = ("", "settings", "reward", "accuracy before", "accuracy", "margin", "right", "seconds", "why so")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown. accuracy, margin: of the implied reward on held-out pairs; right: completions."""
    rows = [HEAD, ("---",) * len(HEAD)]
    for r in results:
        stated = (f"{key} {value}" for key, value in {**r["settings"], "lr": f"{r['lr']:.0e}"}.items())
        figures = (f"{r['accuracy_before']:.3f}", f"{r['accuracy']:.3f}", f"{r['margin']:+.2f}")
        last = (f"{r['right']:.1%}", f"{r['seconds']:.0f}", r["why"])
        rows.append((r["name"], f"{r['objective']}: {', '.join(stated)}", r["reward"], *figures, *last))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def split_page(page: Path) -> tuple[str, str]:
    """What stands before and after the page's results. Raises UserError where it has no place for them."""
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, _, rest = content.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise UserError(f"--page: {page} has no {MARKS[0]} and {MARKS[1]} to write the table between")
    return before, after


def write_page(page: Path, text: str) -> None:
    """``text`` between the page's marks, and the picture beside it."""
    before, after = split_page(page)
    atomic_write(page, f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}".encode())
    save(text, page.with_suffix(".png"))


def chosen_entries(only: str) -> tuple[Entry, ...]:
    """Entries by name, in the table's order. Raises UserError for a name that there is not."""
    names = [name.strip() for name in only.split(";") if name.strip()]
    known = [entry.name for entry in ENTRIES]
    for name in names:
        if name not in known:
            raise UserError(f"--only: no objective {name!r}; there are {'; '.join(known)}")
    return tuple(entry for entry in ENTRIES if not names or entry.name in names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of the table's first column, parted by ';'")
    parser.add_argument("--steps", type=int, default=STEPS, help="a run (default: %(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=WARMUP_STEPS, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--reuse", action="store_true", help="keep the warm-up and results of equal configs")
    parser.add_argument("--folder", type=Path, default=Path("build/objectives"), help="of all runs")
    parser.add_argument("--out", type=Path, help="JSON (default: result.json in the folder)")
    parser.add_argument("--page", type=Path, help="also write table and picture into this page")
    return parser


def run(options: argparse.Namespace) -> int:
    entries = chosen_entries(options.only)
    for name in ("steps", "warmup_steps", "jobs"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(options, name)}")
    if options.page:
        split_page(options.page)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    torch.set_num_threads(threads)
    bench = Bench(options.folder.absolute(), options.steps, options.warmup_steps, threads)
    right_before, results = measure(entries, bench, options.jobs, options.reuse)
    text = (
        f"{table(results)}\n\nThe warm-up: {right_before:.1%} of the completions right. {bench.steps} steps "
        f"each; torch {torch.__version__}, {options.jobs} run(s) at once, threads a run: {threads}."
    )
    print(text)
    found = {"steps": bench.steps, "right_before": right_before, "results": results}
    atomic_write(options.out or bench.folder / "result.json", (json.dumps(found, indent=1) + "\n").encode())
    save(text, bench.folder / "objectives.png")
    if options.page:
        write_page(options.page, text)
    low = [r["name"] for r in results if not r["accuracy"] > MIN_ACCURACY] if options.steps >= STEPS else []
    if low:
        _say(f"error: held-out reward accuracy must be above {MIN_ACCURACY}, but is not for {', '.join(low)}")
    return 1 if low else 0


def main(arguments: Sequence[str] | None = None) -> int:
    logging.getLogger("nxdt_align").setLevel(logging.ERROR)
    try:
        return run(_parser().parse_args(arguments))
    except UserError as error:
        _say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
