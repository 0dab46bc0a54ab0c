"""Steps of a data set: from the indices of a global batch to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nxdt_align.batch import Batch, SlotRole, Topology
from nxdt_align.data.collate import Collator, GlobalCounts
from nxdt_align.data.packing import Bucket, Layout, RowPlanner
from nxdt_align.data.tokenize import TokenizedSet

PAIR_ROLES = (SlotRole.CHOSEN, SlotRole.REJECTED)
SINGLE_ROLES = (SlotRole.SINGLE,)
UNPAIRED_ROLES = (SlotRole.SINGLE, SlotRole.KL)
REFERENCE_GROUP = 256
"""Examples of similar length that the reference pass lays into rows together."""


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Rows of data-set indices, and the shape that they are laid into."""

    bucket: Bucket
    rows: tuple[tuple[int, ...], ...]

    @property
    def records(self) -> list[int]:
        return [index for row in self.rows for index in row]


class StepDataset(Dataset[list[Batch]]):
    """Item = the data-set indices of one global batch; value = one rank's micro-batches of it.

    All that happens here is a function of the indices and of integers, so it runs in worker
    processes.
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
        self._collate = Collator(examples, layout, roles, tail_weight, with_prompts)
        self._response_tokens = examples.response_lengths.sum(1)

    def __getitem__(self, indices: Sequence[int]) -> list[Batch]:
        return self.lay_out(indices)

    def lay_out(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Batch]:
        """The step's micro-batches in ``bucket``, or in the one that the planner chooses."""
        counts = GlobalCounts(len(indices), int(self._response_tokens[list(indices)].sum()))
        plan = self.planner.plan(indices, bucket)
        return [
            self._collate([[indices[i] for i in row] for row in rows], plan.bucket, counts)
            for rows in self.planner.rows_of_rank(plan, self._topology.data_parallel_rank)
        ]

    def reference_plan(self) -> list[PlannedMicroBatch]:
        """The reference pass: every distinct record once, planned from the whole data set.

        Neighbours are alike in length, so that rows are full. The plan is the same for every rank
        and every restart, which is what makes a resumed pass equal to an uninterrupted one.
        """
        first_of = {record: i for i, record in reversed(list(enumerate(self.examples.record_ids)))}
        order = sorted(first_of.values(), key=lambda i: (-self._tokens(i), i))
        planned = []
        for start in range(0, len(order), REFERENCE_GROUP):
            group = order[start : start + REFERENCE_GROUP]
            plan = self.planner.plan(group)
            rows = [tuple(group[i] for i in row) for row in plan.rows if row]
            size = self.planner.micro_batch_size
            planned += [
                PlannedMicroBatch(plan.bucket, tuple(rows[i : i + size])) for i in range(0, len(rows), size)
            ]
        return planned

    def collate_planned(self, planned: PlannedMicroBatch) -> Batch:
        """A micro-batch of ``reference_plan``, filled up with empty rows to its static size."""
        missing = self.planner.micro_batch_size - len(planned.rows)
        rows = list(planned.rows) + [()] * missing
        return self._collate(rows, planned.bucket, GlobalCounts(1, 1))

    def _tokens(self, index: int) -> int:
        return int(self.examples.prompt_lengths[index] + self.examples.response_lengths[index].sum())


def look_up_reference(table: npt.NDArray[Any], batch: Batch) -> Tensor:
    """(B, R) float32: each slot's value of ``table``, (N, k) with a column a response."""
    is_second = (batch.slot_role == SlotRole.REJECTED) | (batch.slot_role == SlotRole.KL)
    column = torch.where(is_second, 1, 0)
    values = torch.from_numpy(table)[batch.record_index.clamp(min=0), column]
    return torch.where(batch.slot_valid, values, 0.0).float()
