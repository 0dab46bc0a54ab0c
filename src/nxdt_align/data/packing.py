"""The row plan: the arrangement of a step's examples in rows of one static length.

Packing affects only the speed: a plan decides where tokens are, never which tokens there are. Lengths are in
tokens; ``P`` is a prompt's length, ``n`` a response's. A row never holds a response's last token, which is
only predicted, so a sequence takes P - 1 + n positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nxdt_align.data.bin_packing import Room, best_fit, level
from nxdt_align.errors import UserError

Layout = Literal["none", "packed", "shared_prompt"]
ROUNDING = 64
"""Row lengths are multiples of this: it suits matrix units and keeps the number of candidates small."""
MAX_BUCKETS = 3


class Lengths(Protocol):
    """The part of a tokenized set that a plan uses."""

    @property
    def prompt_lengths(self) -> npt.NDArray[Any]:
        """(N,) int"""

    @property
    def response_lengths(self) -> npt.NDArray[Any]:
        """(N, k) int: k responses per example"""


class _SomeLengths(NamedTuple):
    prompt_lengths: npt.NDArray[Any]
    response_lengths: npt.NDArray[Any]


Indices = Sequence[int] | npt.NDArray[Any]
Where = npt.NDArray[Any] | slice
"""Indices of examples, or a span of them."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The static shape of a row; each bucket is one compiled graph on Trainium."""

    tokens: int
    """S: token positions."""
    responses: int
    """T: response positions."""
    slots: int
    """R: response slots."""


RowCost = Callable[[Bucket], float]
"""What a row of a shape costs, in any unit."""


@dataclass(frozen=True)
class StepPlan:
    """Rows of one step, for all ranks. ``rows[i]`` holds positions into the step's examples."""

    bucket: Bucket
    rows: tuple[tuple[int, ...], ...]


def shares_prompt(
    prompt_length: npt.NDArray[Any], response_lengths: npt.NDArray[Any], window: int | None
) -> npt.NDArray[Any]:
    """(N,) bool: whether an example's responses stand around one prompt in layout shared_prompt.

    ``[first response, reversed | prompt | second response]``: each token then sees one interval of keys. That
    takes exactly two responses, and the longer of them, with the prompt, must not exceed a sliding
    ``window``: a reversed response would see two intervals, its own tokens and the prompt's tail. Others are
    laid as in layout packed.

    Args:
        prompt_length: (N,) tokens.
        response_lengths: (N, k) tokens.
    """
    if response_lengths.shape[1] != 2:
        return np.zeros(len(prompt_length), np.bool_)
    longest = prompt_length - 1 + response_lengths.max(1)
    return np.asarray(longest <= (np.inf if window is None else window))


def example_tokens(lengths: Lengths, layout: Layout, window: int | None = None) -> npt.NDArray[Any]:
    """(N,) positions that each example takes in a row; of its longest single row for layout none."""
    context = lengths.prompt_lengths - 1
    sequences = context[:, None] + lengths.response_lengths
    if layout == "none":
        return np.asarray(sequences.max(1))
    apart = sequences.sum(1)
    if layout == "packed":
        return np.asarray(apart)
    together = context + lengths.response_lengths.sum(1)
    shared = shares_prompt(lengths.prompt_lengths, lengths.response_lengths, window)
    return np.asarray(np.where(shared, together, apart))


def example_responses(lengths: Lengths, layout: Layout, with_prompts: bool = False) -> npt.NDArray[Any]:
    """(N,) predicted tokens of each example in a row: its responses', and ``with_prompts`` also its prompt's
    from the second on, once, for the first response."""
    predicted = lengths.response_lengths.copy()
    if with_prompts:
        predicted[:, 0] += lengths.prompt_lengths - 1
    return np.asarray(predicted.max(1) if layout == "none" else predicted.sum(1))


class RowPlanner:
    """Arranges a step's examples in rows, identically on every rank, worker and restart.

    Args:
        lengths: of the whole data set.
        layout: none, packed or shared_prompt.
        buckets: ascending row lengths S, or None to choose up to MAX_BUCKETS from the data.
        examples_per_step: the global batch size N.
        ranks: data-parallel size.
        micro_batch_size: pairs (layout none) or rows (packed layouts) per micro-batch.
        min_micro_batches: minimum per rank, as a pipeline schedule needs.
        round_size: micro-batches must divide into equal rounds of at least this many, as an interleaved
            pipeline schedule needs; 1 for any number.
        fixed_micro_batches: every step of a bucket gets the same number of micro-batches, for devices on
            which another number is another graph: the maximum over a sample of steps; a step that needs
            more gets twice as many.
        seq_length: the longest sequence after truncation; the row length of layout none.
        with_prompts: leave room for predicted prompt tokens.
        window: tokens that the model's local layers see; None for a model without such layers.
        only_local: no layer sees more than the window.
        row_multiple: row lengths are multiples of this, as a device's kernel may require.
        row_cost: by which row lengths are chosen, and of those that hold a step the one that it takes; rows
            are then at most ``seq_length`` long, or as long as the longest example. None: by positions, in
            rows of any length.
        name: name of the data set, for messages.

    Raises UserError for buckets that do not hold the data, and for a response that is longer than all that a
    token sees.
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
        window: int | None = None,
        only_local: bool = True,
        row_multiple: int = 1,
        row_cost: RowCost | None = None,
        name: str = "the data",
    ) -> None:
        if only_local:
            _check_window(window, lengths, name)
        self.window = window
        self.layout: Layout = layout
        self.ranks = ranks
        self.micro_batch_size = micro_batch_size
        self.min_micro_batches = min_micro_batches
        self.round_size = round_size
        self._row_cost: RowCost = row_cost or _positions
        self._examples_per_step = examples_per_step
        self.responses_per_example = int(lengths.response_lengths.shape[1])
        self._lengths, self._with_prompts = lengths, with_prompts
        self._sampled: list[npt.NDArray[Any]] | None = None
        # Per span, here and below: what is computed of every example takes no memory per example.
        longest = max(int(self._tokens(span).max()) for span in self._spans())
        if buckets is not None:
            _check_buckets(buckets, longest, layout, row_multiple, name)
            sizes = tuple(buckets)
        elif layout == "none":
            sizes = (_round_up(seq_length, row_multiple),)
        else:
            rounding = lcm(ROUNDING, row_multiple)
            most = None if row_cost is None else _round_up(seq_length, rounding)
            sizes = self._choose_buckets(_round_up(longest, rounding), examples_per_step, rounding, most)
        self.buckets = tuple(self._shape(size, examples_per_step) for size in sizes)
        self._micro_batches: dict[Bucket, int] = {}
        if fixed_micro_batches:
            self._micro_batches = self._most_micro_batches(examples_per_step)

    def plan(self, examples: Indices, bucket: Bucket | None = None) -> StepPlan:
        """The rows of a step whose examples are these indices into the data set, in ``bucket`` (which must
        hold them) or in the bucket that costs least: positions, or what the planner was given."""
        where = np.asarray(examples, np.int64)
        tokens, responses = self._tokens(where), self._responses(where)
        fitting = self._fitting(tokens, responses) if bucket is None else [bucket]
        plans = [(self._rows(tokens, responses, fits), fits) for fits in fitting]
        rows, chosen = min(plans, key=lambda p: (len(p[0]) * self._row_cost(p[1]), p[1].tokens))
        if self.ranks > 1 and self.layout != "none":
            equal = level(tokens, responses, self._room(chosen), len(rows))
            if equal:
                # Best fit leaves one nearly empty row; leveling the same number of rows may balance ranks
                # better.
                rows = min((rows, self._dealt(equal, tokens)), key=lambda r: self._busiest(r, tokens))
        return StepPlan(chosen, tuple(rows))

    def cost_per_step(self) -> float:
        """What a rank's rows of a step cost, on average over a sample of steps: positions, or what the
        planner was given. It does not depend on whether micro-batches are fixed."""
        rows_each = self.responses_per_example if self.layout == "none" else 1
        costs = []
        for step in self._sample_steps(self._examples_per_step):
            tokens, responses = self._tokens(step), self._responses(step)
            costs.append(
                min(
                    self._filled_up(self._rows_needed(tokens, responses, bucket), None)
                    * self._row_cost(bucket)
                    for bucket in self._fitting(tokens, responses)
                )
            )
        return rows_each * float(np.mean(costs)) / self.ranks

    def _rows_needed(self, tokens: npt.NDArray[Any], responses: npt.NDArray[Any], bucket: Bucket) -> int:
        return len(tokens) if self.layout == "none" else len(best_fit(tokens, responses, self._room(bucket)))

    def fitting(self, examples: Indices) -> list[Bucket]:
        """The buckets that can hold each of these examples."""
        where = np.asarray(examples, np.int64)
        return self._fitting(self._tokens(where), self._responses(where))

    def _fitting(self, tokens: npt.NDArray[Any], responses: npt.NDArray[Any]) -> list[Bucket]:
        longest, most = int(tokens.max()), int(responses.max())
        return [b for b in self.buckets if b.tokens >= longest and b.responses >= most]

    @property
    def examples(self) -> int:
        """Number of examples in the data set."""
        return len(self._lengths.prompt_lengths)

    def shortest(self) -> int:
        """The first of the examples that fill the fewest positions."""
        found: list[tuple[int, int]] = []
        for span in self._spans():
            real = self._real_tokens(span)
            found.append((int(real.min()), int(span.start + real.argmin())))
        return min(found)[1]

    def rows_of_rank(self, plan: StepPlan, rank: int) -> list[list[tuple[int, ...]]]:
        """One rank's micro-batches: lists of rows. Every rank gets the same number."""
        mine = plan.rows[rank :: self.ranks]
        size = self.micro_batch_size
        return [list(mine[i : i + size]) for i in range(0, len(mine), size)]

    def real_tokens(self, examples: Indices) -> npt.NDArray[Any]:
        """(n,) positions that each example fills, over all of its rows."""
        return self._real_tokens(np.asarray(examples, np.int64))

    # Lengths of the examples at some indices, or in a span of the data set

    def _at(self, where: Where) -> _SomeLengths:
        return _SomeLengths(self._lengths.prompt_lengths[where], self._lengths.response_lengths[where])

    def _tokens(self, where: Where) -> npt.NDArray[Any]:
        return example_tokens(self._at(where), self.layout, self.window)

    def _responses(self, where: Where) -> npt.NDArray[Any]:
        return example_responses(self._at(where), self.layout, self._with_prompts)

    def _real_tokens(self, where: Where) -> npt.NDArray[Any]:
        return example_tokens(self._at(where), "packed") if self.layout == "none" else self._tokens(where)

    def _spans(self, size: int = 2**16) -> Iterator[slice]:
        return (slice(begin, begin + size) for begin in range(0, self.examples, size))

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
        """Sort by fill and deal in a zigzag, so that similar rows go to different ranks and no rank always
        gets the fuller one."""
        if self.layout != "none":
            rows = sorted(rows, key=lambda row: (-int(tokens[list(row)].sum()), row))
        turns = [rows[i : i + self.ranks] for i in range(0, len(rows), self.ranks)]
        return [row for i, turn in enumerate(turns) for row in (turn[::-1] if i % 2 else turn)]

    def _busiest(self, rows: Sequence[tuple[int, ...]], tokens: npt.NDArray[Any]) -> int:
        """Tokens of the rank that has the most."""
        fills = [int(tokens[list(row)].sum()) for row in rows]
        return max((sum(fills[rank :: self.ranks]) for rank in range(self.ranks)), default=0)

    def _filled_up(self, rows: int, bucket: Bucket | None) -> int:
        """``rows`` rounded up to whole micro-batches on every rank, as many as the schedule needs."""
        unit = self.ranks * self.micro_batch_size
        count = max(-(-rows // unit), self.min_micro_batches)
        multiple = 1 if bucket is None else self._micro_batches.get(bucket, 1)
        count = _round_up(count, multiple)
        # torch's interleaved schedule requires the micro-batches to be divisible by the number of rounds,
        # count // pipeline size.
        while count % max(1, count // self.round_size):
            count += multiple
        return count * unit

    def _most_micro_batches(self, examples_per_step: int) -> dict[Bucket, int]:
        """Maximum micro-batches per rank over a sample of steps, by bucket; 1 for a bucket that no step
        uses."""
        most = dict.fromkeys(self.buckets, 1)
        for step in self._sample_steps(examples_per_step):
            plan = self.plan(step)
            most[plan.bucket] = max(most[plan.bucket], len(plan.rows) // (self.ranks * self.micro_batch_size))
        return most

    def _choose_buckets(
        self, largest: int, examples_per_step: int, rounding: int, most: int | None
    ) -> tuple[int, ...]:
        """The row lengths, multiples of ``rounding``, that cost least over a sample of steps, up to ``most``.

        The largest must hold the longest example; up to two more are added while each saves at least 2%, as
        each is one more graph to compile.
        """
        steps = [(self._tokens(s), self._responses(s)) for s in self._sample_steps(examples_per_step)]
        costs = {
            size: np.array([self._step_cost(*step, size) for step in steps])
            for size in _candidates(
                largest, int(np.mean([tokens.sum() for tokens, _ in steps])), rounding, most
            )
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

    def _step_cost(self, tokens: npt.NDArray[Any], responses: npt.NDArray[Any], size: int) -> float:
        """Of a step in rows of ``size``; infinite if an example does not fit."""
        if tokens.max() > size:
            return float("inf")
        rows = best_fit(tokens, responses, Room(size, size))
        share = responses.sum() / tokens.sum()
        row = Bucket(size, min(size, _round_up(int(size * share))), self.responses_per_example)
        return float(self._filled_up(len(rows), None) * self._row_cost(row))

    def _sample_steps(self, examples_per_step: int, most: int = 200) -> list[npt.NDArray[Any]]:
        if self._sampled is None:
            # A fixed seed: buckets must not change with the run's seed, or graphs would be compiled anew.
            self._sampled = sample_steps(self.examples, examples_per_step, most)
        return self._sampled

    def _shape(self, size: int, examples_per_step: int) -> Bucket:
        """A bucket's T and R, from the rows of a sample of steps, with some slack."""
        if self.layout == "none":
            most = max(int(self._responses(span).max()) for span in self._spans())
            return Bucket(size, min(size, _round_up(most)), 1)
        needed = max(
            int(self._responses(span)[self._tokens(span) <= size].max(initial=1)) for span in self._spans()
        )
        most_responses, most_examples = needed, 1
        for step in self._sample_steps(examples_per_step):
            tokens, responses = self._tokens(step), self._responses(step)
            tokens, responses = tokens[tokens <= size], responses[tokens <= size]
            for row in best_fit(tokens, responses, Room(size, size)):
                most_responses = max(most_responses, int(responses[list(row)].sum()))
                most_examples = max(most_examples, len(row))
        # A quarter more than seen: slots cost little, and a row that lacks one stays emptier than it could
        # be.
        examples = -(-most_examples * 5 // 4)
        return Bucket(size, min(size, _round_up(most_responses)), examples * self.responses_per_example)


def sample_steps(examples: int, examples_per_step: int, most: int = 200) -> list[npt.NDArray[Any]]:
    """The indices of up to ``most`` steps of an order that depends on the number of examples alone."""
    taken = np.random.default_rng(0).permutation(examples)[: most * examples_per_step].copy()
    return [taken[i : i + examples_per_step] for i in range(0, len(taken), examples_per_step)]


def _positions(bucket: Bucket) -> float:
    return bucket.tokens


def _round_up(value: int, multiple: int = ROUNDING) -> int:
    return -(-value // multiple) * multiple


def _candidates(largest: int, typical_step: int, rounding: int, most: int | None) -> list[int]:
    """Candidate row lengths: the largest that is needed, and a geometric grid up to a step's size, or to
    ``most``."""
    top = max(largest, _round_up(typical_step, rounding))
    if most is not None:
        top = max(largest, min(top, most))
    grid = {largest}
    size = rounding
    while size <= top:
        grid.add(size)
        size = _round_up(max(size + rounding, int(size * 1.2)), rounding)
    if largest < top:
        grid.add(top)
    return sorted(grid)


def _check_window(window: int | None, lengths: Lengths, name: str) -> None:
    if window is None:
        return
    # A prompt of one token is the start of a whole sequence that is trained on.
    longest = np.where(lengths.prompt_lengths > 1, lengths.response_lengths.max(1), 0)
    at = int(longest.argmax())
    if longest[at] > window:
        raise UserError(
            f"sliding_window: must be at least the longest response, but is {window}, and example {at} of "
            f"{name} has a response of {longest[at]} tokens, whose last ones would see nothing of the "
            f"prompt; set data.seq_length to {window} at most, or leave out such records"
        )


def _check_buckets(
    buckets: Sequence[int], longest: int, layout: Layout, row_multiple: int, name: str
) -> None:
    if not buckets or any(b <= 0 for b in buckets) or sorted(set(buckets)) != list(buckets):
        raise UserError(
            f"data.buckets: must be positive row lengths in ascending order, but is {list(buckets)}"
        )
    if any(b % row_multiple for b in buckets):
        raise UserError(
            f"data.buckets: must be multiples of {row_multiple}, as the flash kernel asks for, but is "
            f"{list(buckets)}; set data.attention=dense for others"
        )
    if buckets[-1] < longest:
        raise UserError(
            f"data.buckets: the largest must hold the longest example of {name} after truncation, which "
            f"takes {longest} tokens in layout {layout}, but is {buckets[-1]}; {_round_up(longest)} would fit"
        )
