"""Reports on the row plan of a data set before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nxdt_align.config.data import DataConfig
from nxdt_align.data.packing import Bucket, Layout, RowPlanner, sample_steps
from nxdt_align.data.steps import Split, StepDataset


@dataclass(frozen=True)
class PlanReport:
    """Statistics over ``steps`` steps of the data, summed over all ranks."""

    layout: Layout
    buckets: tuple[Bucket, ...]
    micro_batch_size: int
    steps: int
    steps_of_bucket: dict[Bucket, int]
    rows: int
    empty_rows: int
    """Empty rows among ``rows``, added to fill micro-batches up to the number that ranks and pipeline
    need."""
    positions: int
    """Token positions, padding included."""
    tokens: int
    """Positions that hold a token."""
    padded: int
    """Positions that layout none would compute: a row of seq_length per response."""
    imbalance: float
    """Tokens of the busiest rank over the mean rank's, averaged over steps; 1 is a perfect balance."""

    @classmethod
    def measure(
        cls,
        planner: RowPlanner,
        examples: int,
        examples_per_step: int,
        seq_length: int,
        most_steps: int = 200,
    ) -> PlanReport:
        """Plan up to ``most_steps`` steps of a shuffled order."""
        steps = sample_steps(examples, examples_per_step, most_steps)
        rows_each = planner.responses_per_example if planner.layout == "none" else 1
        rows = empty = positions = tokens = 0
        used = dict.fromkeys(planner.buckets, 0)
        ratios = []
        for step in steps:
            plan = planner.plan(step)
            used[plan.bucket] += 1
            rows += len(plan.rows) * rows_each
            empty += sum(not row for row in plan.rows) * rows_each
            positions += len(plan.rows) * rows_each * plan.bucket.tokens
            real = planner.real_tokens(step)
            tokens += int(real.sum())
            shares = [
                sum(int(real[list(row)].sum()) for batch in planner.rows_of_rank(plan, rank) for row in batch)
                for rank in range(planner.ranks)
            ]
            ratios.append(max(shares) * planner.ranks / max(1, sum(shares)))
        seen = sum(len(step) for step in steps)
        return cls(
            layout=planner.layout,
            buckets=planner.buckets,
            micro_batch_size=planner.micro_batch_size,
            steps=len(steps),
            steps_of_bucket=used,
            rows=rows,
            empty_rows=empty,
            positions=positions,
            tokens=tokens,
            padded=seen * planner.responses_per_example * seq_length,
            imbalance=float(np.mean(ratios)),
        )

    @property
    def fill(self) -> float:
        return self.tokens / self.positions

    @property
    def saved(self) -> float:
        """Fraction of layout none's positions that this plan avoids."""
        return 1 - self.positions / self.padded

    def __str__(self) -> str:
        shapes = "\n".join(
            f"    {b.tokens} tokens x {self.micro_batch_size} row(s), {b.responses} response tokens and "
            f"{b.slots} responses per row: {self.steps_of_bucket[b] / self.steps:.0%} of the steps"
            for b in self.buckets
        )
        empty = f" ({self.empty_rows / self.steps:.1f} empty)" if self.empty_rows else ""
        return (
            f"layout {self.layout}, measured over {self.steps} step(s)\n"
            f"  buckets: {len(self.buckets)}, each one graph\n{shapes}\n"
            f"  {round(self.rows / self.steps, 1):g} rows per step over all ranks{empty}\n"
            f"  fill: {self.fill:.1%} ({self.tokens:,} tokens in {self.positions:,} positions)\n"
            f"  packing saves {self.saved:.0%} of the {self.padded:,} padded tokens "
            f"({self.padded / self.positions:.1f}x fewer)\n"
            f"  busiest rank: {self.imbalance:.2f} times the mean rank's tokens"
        )


@dataclass(frozen=True)
class SplitReport:
    """A split's data and its row plan; in full as text."""

    examples: int
    truncated: int
    plan: PlanReport

    def __str__(self) -> str:
        return f"{self.examples} examples, {self.truncated} of them truncated; {self.plan}"


def row_reports(splits: Mapping[Split, StepDataset], data: DataConfig) -> dict[Split, SplitReport]:
    found = {}
    for split, dataset in splits.items():
        examples = dataset.examples
        plan = PlanReport.measure(dataset.planner, len(examples), data.global_batch_size, data.seq_length)
        found[split] = SplitReport(len(examples), examples.truncated, plan)
    return found


def summary(reports: Mapping[Split, SplitReport]) -> str:
    """The first words on a run's data, in one line."""
    counts = " and ".join(
        f"{report.examples:,} {split} examples"
        + (f" ({report.truncated:,} truncated)" * bool(report.truncated))
        for split, report in reports.items()
    )
    plan = reports["train"].plan
    return (
        f"{counts}; layout {plan.layout}, {plan.padded / plan.positions:.1f} times fewer tokens "
        f"than padded to seq_length, {len(plan.buckets)} bucket(s) of rows"
    )
