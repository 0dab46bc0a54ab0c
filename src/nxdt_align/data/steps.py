"""Steps: the data order, the global batch of each step, and a rank's micro-batches of it.

The unit of order is a step: the indices of one global batch. The ranks divide each step (see packing.py), so
no example is seen twice, and the order depends neither on the number of ranks nor on that of the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from nxdt_align.batch import Batch, SlotRole, Topology
from nxdt_align.data.collate import Collator, GlobalCounts
from nxdt_align.data.packing import Bucket, Layout, RowPlanner
from nxdt_align.data.token_sets import TokenizedSet
from nxdt_align.record_ids import distinct

Split = Literal["train", "val"]
PAIR_ROLES = (SlotRole.CHOSEN, SlotRole.REJECTED)
SINGLE_ROLES = (SlotRole.SINGLE,)
UNPAIRED_ROLES = (SlotRole.SINGLE, SlotRole.KL)
REFERENCE_GROUP = 256
"""Examples of similar length that the reference pass lays into rows together."""
VISITS = 2
"""Steps per shape: the first creates the optimizer's state, so the second is another graph."""


class StepSampler(Sampler[tuple[int, ...]]):
    """Yields the examples of each step of an epoch.

    It keeps no position: it calls ``steps_done`` when an iteration starts, so that a resumed run continues in
    the middle of its epoch, and prefetched steps do not count as trained. The last step of an epoch is
    smaller if the batch size does not divide the number of examples; the loss is divided by its true size.

    Args:
        examples: N, the size of the data set.
        examples_per_step: the global batch size.
        seed: determines the order, together with the epoch.
        shuffle: False for validation.
        steps_done: steps trained so far, counted over epochs.
    """

    def __init__(
        self,
        examples: int,
        examples_per_step: int,
        seed: int,
        *,
        shuffle: bool = True,
        steps_done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.examples = examples
        self.examples_per_step = examples_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._steps_done = steps_done

    def order(self, epoch: int) -> npt.NDArray[Any]:
        """(N,) indices in the order of this epoch."""
        if not self._shuffle:
            return np.arange(self.examples)
        # A new generator per epoch: a resumed run draws the same order without replaying earlier epochs.
        # Shuffled in place, in half the memory of permutation(), which draws the same order.
        order = np.arange(self.examples, dtype=np.int32 if self.examples < 2**31 else np.int64)
        np.random.default_rng([self._seed, epoch]).shuffle(order)
        return order

    def consumed(self, steps: int) -> int:
        """Examples seen in the first ``steps`` steps, over epochs."""
        epochs, rest = divmod(steps, len(self))
        return epochs * self.examples + min(rest * self.examples_per_step, self.examples)

    def __len__(self) -> int:
        """Steps of a whole epoch, even for a resumed one: Lightning adds the steps already done."""
        return -(-self.examples // self.examples_per_step)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch, first = divmod(self._steps_done(), len(self))
        yield from self.steps(epoch, first)

    def steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, ...]]:
        """The steps of an epoch from its ``first`` one."""
        order = self.order(epoch)
        for step in range(first, len(self)):
            start = step * self.examples_per_step
            yield tuple(order[start : start + self.examples_per_step].tolist())


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Rows of data-set indices, and their shape."""

    bucket: Bucket
    rows: tuple[tuple[int, ...], ...]

    @property
    def records(self) -> list[int]:
        return [index for row in self.rows for index in row]


class ReferencePlan:
    """The micro-batches of the reference pass: every distinct record once.

    Sorted by length, so that rows fill up. The plan is the same on every rank and after every restart, which
    makes a resumed pass equal to an uninterrupted one. Rows are planned group by group as they are asked for,
    so that a plan of millions takes no time before the first and no memory per micro-batch.
    """

    def __init__(self, examples: TokenizedSet, planner: RowPlanner) -> None:
        self._examples, self._planner = examples, planner

    @cached_property
    def _order(self) -> npt.NDArray[Any]:
        """Each distinct record's first example, the longest first; not asked for where all is stored."""
        examples = self._examples
        first, _ = distinct(examples.ids())
        tokens = examples.prompt_lengths[first] + examples.response_lengths[first].sum(1, dtype=np.int32)
        order: npt.NDArray[Any] = first[np.argsort(-tokens, kind="stable")]
        return order

    @property
    def most_records(self) -> int:
        """At least the records of any micro-batch; the same whatever is missing."""
        most = max(bucket.slots // self._planner.responses_per_example for bucket in self._planner.buckets)
        if self._planner.layout == "none":
            most = 1
        return self._planner.micro_batch_size * max(most, 1)

    def __iter__(self) -> Iterator[PlannedMicroBatch]:
        return self.needed(np.ones(self._planner.examples, np.bool_))

    def one_of_each_shape(self) -> Iterator[PlannedMicroBatch]:
        """The first micro-batch of each bucket that one has: its rows are always as many."""
        seen: set[Bucket] = set()
        for planned in self:
            if planned.bucket not in seen:
                seen.add(planned.bucket)
                yield planned
            if len(seen) == len(self._planner.buckets):
                return

    def needed(
        self, is_missing: npt.NDArray[np.bool_], share: int = 0, shares: int = 1
    ) -> Iterator[PlannedMicroBatch]:
        """The micro-batches with a record that is missing, (N,), whole; of one of ``shares`` equal shares.

        Groups are dealt out in turn, so that each share has its part of the long ones.
        """
        size = self._planner.micro_batch_size
        for start in range(share * REFERENCE_GROUP, len(self._order), shares * REFERENCE_GROUP):
            group = self._order[start : start + REFERENCE_GROUP]
            if not is_missing[group].any():
                continue
            plan = self._planner.plan(group)
            rows = [tuple(group[list(row)].tolist()) for row in plan.rows if row]
            for i in range(0, len(rows), size):
                planned = PlannedMicroBatch(plan.bucket, tuple(rows[i : i + size]))
                if is_missing[planned.records].any():
                    yield planned


class StepDataset(Dataset[list[Batch]]):
    """Item = the data-set indices of one global batch; value = one rank's micro-batches of it.

    A pure function of the indices, so it can run in worker processes.
    """

    def __init__(
        self,
        examples: TokenizedSet,
        planner: RowPlanner,
        layout: Layout,
        topology: Topology,
        tail_weight: float | None = None,
        roles: tuple[SlotRole, ...] | None = None,
        with_prompts: bool = False,
    ) -> None:
        self.examples = examples
        self.planner = planner
        self._topology = topology
        if roles is None:
            roles = PAIR_ROLES if examples.response_lengths.shape[1] == 2 else SINGLE_ROLES
        self._collate = Collator(
            examples, layout, roles, tail_weight, window=planner.window, with_prompts=with_prompts
        )

    def __getitem__(self, indices: Sequence[int]) -> list[Batch]:
        return self.lay_out(indices)

    def lay_out(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Batch]:
        """The step's micro-batches in ``bucket``, by default the planner's choice."""
        tokens = int(self.examples.response_lengths[np.asarray(indices, np.int64)].sum())
        counts = GlobalCounts(len(indices), tokens)
        plan = self.planner.plan(indices, bucket)
        return [
            self._collate([[indices[i] for i in row] for row in rows], plan.bucket, counts)
            for rows in self.planner.rows_of_rank(plan, self._topology.data_parallel_rank)
        ]

    def reference_plan(self) -> ReferencePlan:
        """The reference pass: every distinct record once, planned from the whole data set."""
        return ReferencePlan(self.examples, self.planner)

    def collate_planned(self, planned: PlannedMicroBatch) -> Batch:
        """A micro-batch of ``reference_plan``, padded with empty rows to its static size."""
        missing = self.planner.micro_batch_size - len(planned.rows)
        rows = list(planned.rows) + [()] * missing
        # Counts of 1: log-probabilities are not divided by them.
        return self._collate(rows, planned.bucket, GlobalCounts(1, 1))


def look_up_reference(table: npt.NDArray[Any], batch: Batch) -> Tensor:
    """(B, R) float32: each slot's value of ``table``, (N, k) with a column per response; the batch is on the
    host."""
    is_second = (batch.slot_role == SlotRole.REJECTED) | (batch.slot_role == SlotRole.KL)
    column = torch.where(is_second, 1, 0)
    # By NumPy: of a mapped table, nothing else is read.
    values = torch.from_numpy(np.asarray(table[batch.record_index.clamp(min=0).numpy(), column.numpy()]))
    return torch.where(batch.slot_valid, values, 0.0).float()


# A dry run


@dataclass(frozen=True)
class DryRunStep:
    """A step's examples; ``bucket`` overrides the planner's choice."""

    examples: tuple[int, ...]
    bucket: Bucket | None = None


class DryRunDataset(Dataset[list[Batch]]):
    """Dry-run steps as one rank's micro-batches."""

    def __init__(self, dataset: StepDataset, steps: Sequence[DryRunStep]) -> None:
        self._dataset = dataset
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> list[Batch]:
        step = self._steps[index]
        return self._dataset.lay_out(step.examples, step.bucket)


def dry_run_steps(planner: RowPlanner, steps: Iterable[Sequence[int]]) -> list[DryRunStep]:
    """The first of ``steps``, then each of their shapes ``VISITS`` times, then each bucket that none of
    them uses, since another data order might use it.

    A shape is a bucket and a number of rows. ``steps`` are those of the real run, in its order: its first
    step comes first, because the optimizer's state is created there.
    """
    first: DryRunStep | None = None
    shapes: dict[tuple[Bucket, int], DryRunStep] = {}
    for examples in steps:
        step = DryRunStep(tuple(examples))
        first = first or step
        plan = planner.plan(step.examples)
        shapes.setdefault((plan.bucket, len(plan.rows)), step)
    visited = [*shapes.values(), *_idle_buckets(planner, {bucket for bucket, _ in shapes})]
    return [*([first] if first else []), *(step for step in visited for _ in range(VISITS))]


def step_of_each_bucket(planner: RowPlanner, examples: Sequence[int]) -> dict[Bucket, DryRunStep]:
    """The step of ``examples`` in its bucket, and a step in each other one that can hold an example."""
    found: dict[Bucket, DryRunStep] = {}
    for step in dry_run_steps(planner, [examples]):
        found.setdefault(planner.plan(step.examples, step.bucket).bucket, step)
    return found


def _idle_buckets(planner: RowPlanner, used: set[Bucket]) -> list[DryRunStep]:
    """The shortest example in each bucket that is not ``used`` and can hold it."""
    shortest = planner.shortest()
    fitting = planner.fitting([shortest])
    return [
        DryRunStep((shortest,), bucket)
        for bucket in planner.buckets
        if bucket in fitting and bucket not in used
    ]
