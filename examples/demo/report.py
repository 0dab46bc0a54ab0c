"""What the demo gained, on held-out pairs: ``python -m demo.report --before DIR --after DIR ...``.

Prints figures before and after, where everything is and how to go on. Exits with 1, and the reason,
where the held-out reward accuracy is below MIN_ACCURACY or the completions got hardly better.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.evaluate import (
    Evaluation,
    HuggingFaceModel,
    Objective,
    Pair,
    Rewards,
    read_pairs,
    rewards,
)
from demo.models import LLAMA, MODELS
from demo.task import FAMILIES, read_problem
from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write, explain

MIN_ACCURACY = 0.9
MIN_GAIN = 0.1
"""Least gain in the share of right completions that counts as visible."""
IDENTITY_FILE, REPORT_FILE = "run_identity.json", "report.html"
SAMPLES = 4


@dataclass(frozen=True)
class Places:
    """Where the run left things."""

    export: Path
    tensorboard: Path
    checkpoint: Path
    data: Path
    model: str = LLAMA
    """The small model's family."""


@dataclass(frozen=True)
class Report:
    """Both models on the held-out pairs."""

    objective: Objective
    beta: float
    pairs: Sequence[Pair]
    before: Evaluation
    after: Evaluation

    @property
    def rewards_before(self) -> Rewards:
        return rewards(self.objective, self.beta, self.before.likelihoods, self.before.likelihoods)

    @property
    def rewards_after(self) -> Rewards:
        return rewards(self.objective, self.beta, self.after.likelihoods, self.before.likelihoods)

    def shortfalls(self) -> list[str]:
        """Why the run does not count as a success; empty where it does."""
        faults = []
        if not self.rewards_after.accuracy >= MIN_ACCURACY:
            faults.append(
                f"held-out reward accuracy must be at least {MIN_ACCURACY}, "
                f"but is {self.rewards_after.accuracy:.3f}"
            )
        if not self.after.share_right >= self.before.share_right + MIN_GAIN:
            faults.append(
                f"the share of right completions must rise by at least {MIN_GAIN:.0%}, but went from "
                f"{self.before.share_right:.1%} to {self.after.share_right:.1%}"
            )
        return faults

    def as_json(self) -> bytes:
        figures = {
            "objective": self.objective,
            "beta": self.beta,
            "pairs": len(self.pairs),
            "reward_accuracy": [self.rewards_before.accuracy, self.rewards_after.accuracy],
            "reward_margin": [self.rewards_before.margin, self.rewards_after.margin],
            "right_completions": [self.before.share_right, self.after.share_right],
        }
        return (json.dumps(figures, indent=2) + "\n").encode()


def describe(report: Report) -> str:
    """The figures as a table, with a few completions."""
    return "\n".join((*_table(report), "", *_samples(report)))


def _table(report: Report) -> Iterator[str]:
    before, after = report.rewards_before, report.rewards_after
    yield f"{f'On {len(report.pairs)} held-out pairs':<34}{'before':>10}{'after':>10}"
    yield _row("reward accuracy", before.accuracy, after.accuracy, "{:.3f}")
    yield _row("reward margin", before.margin, after.margin, "{:+.3f}")
    yield _row("right completions", report.before.share_right, report.after.share_right, "{:.1%}")
    for family in FAMILIES:
        here = [i for i, pair in enumerate(report.pairs) if read_problem(pair.prompt).family is family]
        if here:
            shares = [sum(e.right[i] for i in here) / len(here) for e in (report.before, report.after)]
            yield _row(f"  {family.name}", shares[0], shares[1], "{:.1%}")
    if report.objective == "dpo":
        yield "Reward: beta * (log p - log p of the model before). Before, every pair is a tie, counted half."
    else:
        yield "Reward: beta * mean log-probability of a response's tokens."


def _row(name: str, before: float, after: float, style: str) -> str:
    return f"{name:<34}{style.format(before):>10}{style.format(after):>10}"


def _samples(report: Report) -> Iterator[str]:
    """Completions of instructions that the first model got wrong, of as many families as there are."""
    shown: set[str] = set()
    for pair, is_right, old, new in zip(
        report.pairs, report.before.right, report.before.completions, report.after.completions, strict=True
    ):
        family = read_problem(pair.prompt).family.name
        if not is_right and family not in shown and len(shown) < SAMPLES:
            shown.add(family)
            yield f"{pair.prompt}\n    before: {old}\n    after:  {new}"


def next_steps(report: Report, places: Places) -> str:
    """Where things are, and the command for each next step. Give absolute places: a reader may stand
    in another folder."""
    where = (
        ("TensorBoard log", places.tensorboard),
        ("Checkpoint", places.checkpoint),
        ("Hugging Face export", places.export),
        ("Data", places.data),
    )
    lines = [
        *(f"{name + ':':<21}{path}" for name, path in where),
        "",
        "Next steps, from the repository's root",
    ]
    return "\n".join((*lines, *(f"  {what}\n    {command}" for what, command in _steps(report, places))))


def _steps(report: Report, places: Places) -> Iterator[tuple[str, str]]:
    python = shlex.quote(sys.executable)
    objective, other = report.objective, "orpo" if report.objective == "dpo" else "dpo"
    ask = (
        f"from transformers import pipeline; print(pipeline('text-generation', {str(places.export)!r})"
        f"({report.pairs[0].prompt!r})[0]['generated_text'])"
    )
    yield "See the curves", f"{python} -m tensorboard.main --logdir {shlex.quote(str(places.tensorboard))}"
    yield "Ask the aligned model", f"{python} -c {_double_quoted(ask)}"
    family = "" if places.model == LLAMA else f" MODEL={places.model}"
    yield f"The same with {other.upper()}", ("make demo-orpo" if other == "orpo" else "make demo") + family
    yield (
        "Your own model and preference pairs",
        f"{python} -m nxdt_align train --config-name {objective} "
        "exp_manager.resume_from_checkpoint=MODEL_FOLDER_OR_HUB_ID data.train_dir=PAIRS.jsonl",
    )
    yield "What every key of a configuration means", f"{python} -m nxdt_align --help-keys"
    llama = f"CONF_FILE=hf_llama3_8B_{objective.upper()}_config examples/train.sh"
    yield "Llama-3-8B on a trn1.32xlarge", llama


def _double_quoted(text: str) -> str:
    """One word for a POSIX shell, readable where ``text`` has single quotes."""
    return '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'


def read_beta(experiment: Path, objective: Objective) -> float:
    """The beta that a run was trained with. Raises UserError where its folder does not say."""
    path = experiment / IDENTITY_FILE
    key = "kl_beta" if objective == "dpo" else "beta"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["of"]["objective"][objective][key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not give {objective}.{key} of the run ({error!r}): name the run's folder with "
            "--tensorboard, or give --beta"
        ) from error


def make_report(options: argparse.Namespace) -> Report:
    beta = read_beta(options.tensorboard, options.objective) if options.beta is None else options.beta
    pairs = read_pairs(options.data)
    before = HuggingFaceModel(options.before).evaluate(pairs)
    after = HuggingFaceModel(options.after).evaluate(pairs)
    return Report(options.objective, beta, pairs, before, after)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.report", description="Judge the demo on its held-out pairs."
    )
    folders: tuple[tuple[str, str], ...] = (
        ("--before", "Hugging Face folder of the model before alignment"),
        ("--after", "Hugging Face folder of the aligned model"),
        ("--data", "the held-out pairs, or the folder of heldout.jsonl"),
        ("--tensorboard", "the run's folder, where its TensorBoard log is"),
        ("--checkpoint", "folder of the run's checkpoints"),
    )
    for flag, meaning in folders:
        parser.add_argument(flag, type=Path, required=True, help=meaning)
    parser.add_argument(
        "--objective", choices=("dpo", "orpo"), required=True, help="what it was aligned with"
    )
    parser.add_argument(
        "--model", choices=MODELS, default=LLAMA, help="family of the small model (default: %(default)s)"
    )
    parser.add_argument("--beta", type=float, help="of the objective (default: what the run's folder says)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    report = make_report(options)
    print(describe(report), end="\n\n")
    places = Places(
        export=options.after.absolute(),
        tensorboard=options.tensorboard.absolute(),
        checkpoint=options.checkpoint.absolute(),
        data=options.data.absolute(),
        model=options.model,
    )
    print(next_steps(report, places))
    page = places.tensorboard / REPORT_FILE
    if page.is_file():
        print(f"\nThe run's report, to open in a browser: {page}")
    if options.json:
        atomic_write(options.json, report.as_json())
    for fault in report.shortfalls():
        print(f"error: {fault}", file=sys.stderr)
    return 1 if report.shortfalls() else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {explain(error)}")
