"""The row plan: how a step's examples are laid into rows of one static length.

Packing changes the speed and nothing else: a plan decides where tokens stand, never which tokens
there are. Lengths are in tokens; ``P`` is a prompt's length, ``n`` a response's. A row never holds a
response's last token, which is only predicted, so a sequence takes P - 1 + n places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from nxdt_align.data.bin_packing import Room, best_fit, level
from nxdt_align.errors import UserError

Layout = Literal["none", "packed", "shared_prompt"]
ROUNDING = 64
"""Row lengths are multiples of this, which suits matrix units and keeps the choice small."""
MAX_BUCKETS = 3


class Lengths(Protocol):
    """What a plan needs to know of a tokenized set."""

    prompt_lengths: npt.NDArray[Any]
    """(N,) int"""
    response_lengths: npt.NDArray[Any]
    """(N, k) int: k responses per example"""


@dataclass(frozen=True, order=True)
class Bucket:
    """The static shape of a row; each bucket is one compiled graph on Trainium."""

    tokens: int
    """S: places for tokens."""
    responses: int
    """T: places for response tokens."""
    slots: int
    """R: places for responses."""


@dataclass(frozen=True)
class StepPlan:
    """Rows of one step, for all ranks. ``rows[i]`` holds positions into the step's examples."""

    bucket: Bucket
    rows: tuple[tuple[int, ...], ...]


def example_tokens(lengths: Lengths, layout: Layout) -> npt.NDArray[Any]:
    """(N,) places that each example takes in a row; its longest single row for layout none."""
    context = lengths.prompt_lengths - 1
    if layout == "shared_prompt":
        return np.asarray(context + lengths.response_lengths.sum(1))
    sequences = context[:, None] + lengths.response_lengths
    return np.asarray(sequences.sum(1) if layout == "packed" else sequences.max(1))


def example_responses(lengths: Lengths, layout: Layout, with_prompts: bool = False) -> npt.NDArray[Any]:
    """(N,) tokens that each example has predicted in a row: its responses', and ``with_prompts`` its
    prompt's from the second on, once, for the first response."""
    predicted = lengths.response_lengths.copy()
    if with_prompts:
        predicted[:, 0] += lengths.prompt_lengths - 1
    return np.asarray(predicted.max(1) if layout == "none" else predicted.sum(1))


class RowPlanner:
    """Lays a step's examples into rows; the same for every rank, worker and restart.

    Args:
        lengths: of the whole data set.
        layout: none, packed or shared_prompt.
        buckets: ascending row lengths S, or None to choose up to MAX_BUCKETS from the data.
        examples_per_step: the global batch size N.
        ranks: data-parallel size.
        micro_batch_size: pairs (layout none) or rows (packed layouts) a micro-batch.
        min_micro_batches: at least so many a rank, as a pipeline schedule needs.
        round_size: micro-batches go in as many rounds of at least so many as there can be, all of one
            size, as an interleaved pipeline schedule needs; 1 for any number.
        fixed_micro_batches: every step of a bucket gets the same number of micro-batches, for devices to
            which another number is another graph. It is the most that a sample of steps needs; a step
            that needs more gets twice as many.
        seq_length: the longest sequence after truncation; the row length of layout none.
        with_prompts: leave room for the prompts' tokens among those that are predicted.
        name: of the data set, for messages.
    """

    def __init__(
        self,
        lengths: Lengths,
        layout: Layout,
        *,
        examples_per_step: int,
        seq_length: int,
        buckets: Sequence[int] | None = None,
        ranks: int = 1,
        micro_batch_size: int = 1,
        min_micro_batches: int = 1,
        round_size: int = 1,
        with_prompts: bool = False,
        fixed_micro_batches: bool = False,
        name: str = "the data",
    ) -> None:
        self.layout: Layout = layout
        self.ranks = ranks
        self.micro_batch_size = micro_batch_size
        self.min_micro_batches = min_micro_batches
        self.round_size = round_size
        self.responses_per_example = int(lengths.response_lengths.shape[1])
        self._tokens = example_tokens(lengths, layout)
        self._all_tokens = example_tokens(lengths, "packed")
        self._responses = example_responses(lengths, layout, with_prompts)
        longest = int(self._tokens.max())
        if buckets is not None:
            _check_buckets(buckets, longest, layout, name)
            sizes = tuple(buckets)
        elif layout == "none":
            sizes = (seq_length,)
        else:
            sizes = self._choose_buckets(_round_up(longest), examples_per_step)
        self.buckets = tuple(self._shape(size, examples_per_step) for size in sizes)
        self._micro_batches: dict[Bucket, int] = {}
        if fixed_micro_batches:
            self._micro_batches = self._most_micro_batches(examples_per_step)

    def plan(self, examples: Sequence[int], bucket: Bucket | None = None) -> StepPlan:
        """The rows of a step whose examples are these indices into the data set: in ``bucket``, which must
        hold them, or in the one that takes the fewest places."""
        tokens, responses = self._tokens[list(examples)], self._responses[list(examples)]
        fitting = self.fitting(examples) if bucket is None else [bucket]
        plans = [(self._rows(tokens, responses, fits), fits) for fits in fitting]
        rows, chosen = min(plans, key=lambda p: (len(p[0]) * p[1].tokens, p[1].tokens))
        if self.ranks > 1 and self.layout != "none":
            equal = level(tokens, responses, self._room(chosen), len(rows))
            if equal:
                rows = min((rows, self._dealt(equal, tokens)), key=lambda r: self._busiest(r, tokens))
        return StepPlan(chosen, tuple(rows))

    def fitting(self, examples: Sequence[int]) -> list[Bucket]:
        """The buckets that can hold each of these examples."""
        tokens, responses = self._tokens[list(examples)], self._responses[list(examples)]
        return [b for b in self.buckets if b.tokens >= tokens.max() and b.responses >= responses.max()]

    @property
    def examples(self) -> int:
        """Of the data set."""
        return len(self._tokens)

    def rows_of_rank(self, plan: StepPlan, rank: int) -> list[list[tuple[int, ...]]]:
        """One rank's micro-batches: lists of rows. Every rank gets the same number."""
        mine = plan.rows[rank :: self.ranks]
        size = self.micro_batch_size
        return [list(mine[i : i + size]) for i in range(0, len(mine), size)]

    def real_tokens(self, examples: Sequence[int]) -> npt.NDArray[Any]:
        """(n,) places that each example fills, over all of its rows."""
        per_row = self._all_tokens if self.layout == "none" else self._tokens
        return np.asarray(per_row[list(examples)])

    def _rows(
        self, tokens: npt.NDArray[Any], responses: npt.NDArray[Any], bucket: Bucket
    ) -> list[tuple[int, ...]]:
        if self.layout == "none":
            rows: list[tuple[int, ...]] = [(i,) for i in range(len(tokens))]
        else:
            rows = best_fit(tokens, responses, self._room(bucket))
        rows += [()] * (self._filled_up(len(rows), bucket) - len(rows))
        return self._dealt(rows, tokens)

    def _room(self, bucket: Bucket) -> Room:
        return Room(bucket.tokens, bucket.responses, bucket.slots // self.responses_per_example)

    def _dealt(self, rows: Sequence[tuple[int, ...]], tokens: npt.NDArray[Any]) -> list[tuple[int, ...]]:
        """Sorted by fill and dealt to and fro, so that alike rows go to different ranks and no rank gets
        the fuller one each time."""
        if self.layout != "none":
            rows = sorted(rows, key=lambda row: (-int(tokens[list(row)].sum()), row))
        turns = [rows[i : i + self.ranks] for i in range(0, len(rows), self.ranks)]
        return [row for i, turn in enumerate(turns) for row in (turn[::-1] if i % 2 else turn)]

    def _busiest(self, rows: Sequence[tuple[int, ...]], tokens: npt.NDArray[Any]) -> int:
        """Tokens of the rank that has the most."""
        fills = [int(tokens[list(row)].sum()) for row in rows]
        return max((sum(fills[rank :: self.ranks]) for rank in range(self.ranks)), default=0)

    def _filled_up(self, rows: int, bucket: Bucket | None) -> int:
        """``rows`` and the empty ones that make whole micro-batches of them, as many as a rank needs."""
        unit = self.ranks * self.micro_batch_size
        count = max(-(-rows // unit), self.min_micro_batches)
        multiple = 1 if bucket is None else self._micro_batches.get(bucket, 1)
        count = _round_up(count, multiple)
        while count % max(1, count // self.round_size):
            count += multiple
        return count * unit

    def _most_micro_batches(self, examples_per_step: int) -> dict[Bucket, int]:
        """Of a rank's share of any sampled step, by bucket; 1 for a bucket that no step is laid into."""
        most = dict.fromkeys(self.buckets, 1)
        for step in self._sample_steps(examples_per_step):
            plan = self.plan(step.tolist())
            most[plan.bucket] = max(most[plan.bucket], len(plan.rows) // (self.ranks * self.micro_batch_size))
        return most

    def _choose_buckets(self, largest: int, examples_per_step: int) -> tuple[int, ...]:
        """The row lengths that take the fewest places over a sample of steps.

        The largest must hold the longest example; up to two more are added while each saves at
        least 2%.
        """
        steps = self._sample_steps(examples_per_step)
        costs = {
            size: np.array([self._places(step, size) for step in steps])
            for size in _candidates(largest, int(np.mean([self._tokens[s].sum() for s in steps])))
        }
        chosen = [max(costs)] if largest not in costs else [largest]
        for _ in range(MAX_BUCKETS - 1):
            present = np.min([costs[size] for size in chosen], axis=0)
            totals = {
                size: float(np.minimum(present, cost).sum())
                for size, cost in costs.items()
                if size not in chosen
            }
            if not totals:
                break
            best = min(totals, key=lambda size: (totals[size], size))
            if totals[best] > 0.98 * float(present.sum()):
                break
            chosen.append(best)
        return tuple(sorted(chosen))

    def _places(self, step: npt.NDArray[Any], size: int) -> float:
        """Places that a step takes in rows of ``size``; infinite where an example does not fit."""
        tokens = self._tokens[step]
        if tokens.max() > size:
            return float("inf")
        rows = best_fit(tokens, self._responses[step], Room(size, size))
        return float(self._filled_up(len(rows), None) * size)

    def _sample_steps(self, examples_per_step: int, most: int = 200) -> list[npt.NDArray[Any]]:
        order = np.random.default_rng(0).permutation(len(self._tokens))
        starts = range(0, len(order), examples_per_step)
        return [order[i : i + examples_per_step] for i in starts][:most]

    def _shape(self, size: int, examples_per_step: int) -> Bucket:
        """A bucket's T and R, from the rows that a sample of steps fills, with room to spare."""
        if self.layout == "none":
            return Bucket(size, min(size, _round_up(int(self._responses.max()))), 1)
        fits = self._tokens <= size
        needed = int(self._responses[fits].max(initial=1))
        most_responses, most_examples = needed, 1
        for step in self._sample_steps(examples_per_step):
            inside = step[fits[step]]
            for row in best_fit(self._tokens[inside], self._responses[inside], Room(size, size)):
                most_responses = max(most_responses, int(self._responses[inside[list(row)]].sum()))
                most_examples = max(most_examples, len(row))
        examples = -(-most_examples * 5 // 4)
        return Bucket(size, min(size, _round_up(most_responses)), examples * self.responses_per_example)


def _round_up(value: int, multiple: int = ROUNDING) -> int:
    return -(-value // multiple) * multiple


def _candidates(largest: int, typical_step: int) -> list[int]:
    """Row lengths worth trying: the largest that is needed, and a coarse grid around a step's size."""
    top = max(largest, _round_up(typical_step))
    grid = {largest}
    size = ROUNDING
    while size <= top:
        grid.add(size)
        size = _round_up(max(size + ROUNDING, int(size * 1.2)))
    if largest < top:
        grid.add(top)
    return sorted(grid)


def _check_buckets(buckets: Sequence[int], longest: int, layout: Layout, name: str) -> None:
    if not buckets or any(b <= 0 for b in buckets) or sorted(set(buckets)) != list(buckets):
        raise UserError(
            f"data.buckets: must be positive row lengths in ascending order, but is {list(buckets)}"
        )
    if buckets[-1] < longest:
        raise UserError(
            f"data.buckets: the largest must hold the longest example of {name} after truncation, which "
            f"takes {longest} tokens in layout {layout}, but is {buckets[-1]}; {_round_up(longest)} would fit"
        )
