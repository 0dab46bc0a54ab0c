"""The steps of a trial run (``COMPILE=1``): each static shape that the run will meet, in a few steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from nxdt_align.batch import Batch
from nxdt_align.data.packing import Bucket, RowPlanner
from nxdt_align.data.steps import StepDataset

VISITS = 2
"""Steps of each shape: the first one's optimizer has no state yet, so that the second is another graph."""


@dataclass(frozen=True)
class TrialStep:
    """A step's examples; ``bucket`` where the planner would choose another one for them."""

    examples: tuple[int, ...]
    bucket: Bucket | None = None


class TrialDataset(Dataset[list[Batch]]):
    """Trial steps as one rank's micro-batches."""

    def __init__(self, dataset: StepDataset, steps: Sequence[TrialStep]) -> None:
        self._dataset = dataset
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> list[Batch]:
        step = self._steps[index]
        return self._dataset.lay_out(step.examples, step.bucket)


def trial_steps(planner: RowPlanner, steps: Iterable[Sequence[int]]) -> list[TrialStep]:
    """The first of ``steps``, then each of their shapes ``VISITS`` times, then each bucket that none of
    them is laid into, as another order of the data might be.

    A shape is a bucket and a number of rows. ``steps`` are those of the real run, in its order: its first
    step is the trial's first, because the optimizer's state is made there.
    """
    first: TrialStep | None = None
    shapes: dict[tuple[Bucket, int], TrialStep] = {}
    for examples in steps:
        step = TrialStep(tuple(examples))
        first = first or step
        plan = planner.plan(step.examples)
        shapes.setdefault((plan.bucket, len(plan.rows)), step)
    visited = [*shapes.values(), *_idle_buckets(planner, {bucket for bucket, _ in shapes})]
    return [*([first] if first else []), *(step for step in visited for _ in range(VISITS))]


def _idle_buckets(planner: RowPlanner, used: set[Bucket]) -> list[TrialStep]:
    """The shortest example in each bucket that is not ``used`` and can hold it."""
    shortest = int(np.argmin(planner.real_tokens(range(planner.examples))))
    fitting = planner.fitting([shortest])
    return [
        TrialStep((shortest,), bucket)
        for bucket in planner.buckets
        if bucket in fitting and bucket not in used
    ]
