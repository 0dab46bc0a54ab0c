"""An engine without a model, whose log-probabilities depend on everything in a row; and rows for it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nxdt_align.batch import Batch, SlotRole, Topology
from nxdt_align.engines.base import Engine, Objective, StepOutput, WeightSource
from nxdt_align.record_ids import Array, as_bytes

MicroBatch = tuple[tuple[int, ...], ...]
"""Rows of records; a row's length in records is its shape."""


def record_ids(count: int) -> Array:
    """(count, 16) uint8; as text, the record's number in 32 hex digits."""
    return as_bytes([f"{i:032x}" for i in range(count)]).copy()


def plan(count: int, per_row: int = 3, rows: int = 2) -> list[MicroBatch]:
    """Records 0..count-1 in order; an empty row fills up the last micro-batch."""
    all_rows = [tuple(range(i, min(i + per_row, count))) for i in range(0, count, per_row)]
    all_rows += [()] * (-len(all_rows) % rows)
    return [tuple(all_rows[i : i + rows]) for i in range(0, len(all_rows), rows)]


def records_of(micro_batch: MicroBatch) -> list[int]:
    return [record for row in micro_batch for record in row]


def collate(micro_batch: MicroBatch, width: int = 2) -> Batch:
    """R = 3 * width slots per row, ``width`` a record; tokens name the record."""
    rows, slots = len(micro_batch), 3 * width
    owner = torch.full((rows, slots), -1)
    for i, row in enumerate(micro_batch):
        for j, record in enumerate(row):
            owner[i, width * j : width * (j + 1)] = record
    roles = (SlotRole.CHOSEN, SlotRole.REJECTED) if width == 2 else (SlotRole.SINGLE,)
    role = torch.tensor([int(r) for r in roles]).repeat(3).expand(rows, slots)
    ones = torch.ones(rows, slots, dtype=torch.int64)
    return Batch(
        input_ids=owner + 1,
        position_ids=ones,
        key_start=ones.int(),
        key_stop=ones.int(),
        response_positions=ones,
        labels=ones,
        slot_index=ones,
        slot_valid=owner >= 0,
        slot_role=role,
        desirable=ones.bool(),
        record_index=owner,
        global_pairs=torch.tensor(1.0),
        global_tokens=torch.tensor(1.0),
    )


class Exchange:
    """Lets the engines of several threads meet, as a process group lets processes."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=120)
        self.box: list[Any] = [None] * ranks

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.box[rank] = value
        self.barrier.wait()
        values = list(self.box)
        self.barrier.wait()
        return values


class FakeEngine(Engine):
    """Counts its calls. ``fail_after`` calls it raises; ``poison`` makes one record's values NaN."""

    def __init__(
        self,
        rank: int = 0,
        ranks: int = 1,
        exchange: Exchange | None = None,
        *,
        fail_after: int | None = None,
        poison: int | None = None,
    ) -> None:
        self.topology = Topology(ranks, rank, ranks, rank)
        self.device = torch.device("cpu")
        self.calls: list[Tensor] = []
        self.asked_reference: list[bool] = []
        self._exchange = exchange or Exchange(ranks)
        self._fail_after, self._poison = fail_after, poison

    def response_logps(self, batch: Batch, *, reference: bool = False) -> Tensor:
        if self._fail_after is not None and len(self.calls) >= self._fail_after:
            raise RuntimeError("the machine went away")
        self.calls.append(batch.input_ids)
        self.asked_reference.append(reference)
        # Neighbours in the row leave a trace in the last bits, as they do in a real batched product.
        trace = batch.input_ids.float().sum(1, keepdim=True) * 1e-3
        logps = -(batch.record_index.float() + 1) - batch.slot_role.float() / 4 - trace
        if self._poison is not None:
            logps = torch.where(batch.record_index == self._poison, torch.nan, logps)
        return logps

    def all_gather(self, value: Tensor) -> Tensor:
        return torch.stack(self._exchange.swap(self.topology.rank, value))

    def broadcast_object(self, value: Any) -> Any:
        return copy.deepcopy(self._exchange.swap(self.topology.rank, value)[0])

    def gather_objects(self, value: Any) -> list[Any]:
        return copy.deepcopy(self._exchange.swap(self.topology.rank, value))

    def barrier(self) -> None:
        self._exchange.swap(self.topology.rank, None)

    def load_weights(self, source: WeightSource) -> None:
        raise NotImplementedError

    def load_reference(self, source: WeightSource | None) -> None:
        raise NotImplementedError

    def drop_reference(self) -> None:
        raise NotImplementedError

    def step(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        raise NotImplementedError

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        raise NotImplementedError

    def greedy(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
        raise NotImplementedError

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def whole_parameters(self, *, trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        raise NotImplementedError

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        raise NotImplementedError

    def parameter_norm(self) -> Tensor:
        raise NotImplementedError

    def save(
        self,
        directory: Path,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> None:
        raise NotImplementedError

    def read_extra(self, directory: Path) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        raise NotImplementedError
