"""Planned rows -> Batch: the only code that knows the position of each token in a layout.

Legend as in batch.py. In every layout a response starts with its prompt's last token and lacks its own last
token, so the next token is always the next position, and none is seen twice. What a token may see stands
together in its row, so that two numbers say it: of a prompt that two responses share, the first stands before
it, last token first, and the second behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nxdt_align.batch import IGNORE_LABEL, Batch, SlotRole
from nxdt_align.data.packing import Bucket, Layout, shares_prompt
from nxdt_align.data.tokenize import Example

Tokens = npt.NDArray[Any]
"""(n,) integers: token ids, or their indices in a row."""


class Examples(Protocol):
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True)
class GlobalCounts:
    """Sizes of the global batch, the denominators of the loss."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class Collator:
    """Arranges examples in rows of a layout."""

    examples: Examples
    layout: Layout
    roles: tuple[SlotRole, ...]
    """Role of each response of an example: (CHOSEN, REJECTED) or (SINGLE,)."""
    tail_weight: float | None = None
    """Weight of a pair's tokens beyond its shorter response's length (LD-DPO); None: 1."""
    window: int | None = None
    """Tokens that the model's local layers see; None for a model without."""
    with_prompts: bool = False
    """Predict the prompt's tokens too, from the second on, for the likelihood of an example's first
    response."""

    def __call__(self, rows: Sequence[Sequence[int]], bucket: Bucket, counts: GlobalCounts) -> Batch:
        """``rows``: for each planned row, indices of its examples in the data set. In layout none a
        planned row is an example, and gives one row per response."""
        if self.layout == "none":
            filled = [row for indices in rows for row in self._single_rows(indices, bucket)]
        else:
            filled = [self._packed_row(indices, bucket) for indices in rows]
        batch = _to_batch(filled, counts)
        return batch if self.tail_weight is None else batch.with_tail_weight(self.tail_weight)

    def _single_rows(self, indices: Sequence[int], bucket: Bucket) -> list[_Row]:
        result = []
        for which, role in enumerate(self.roles):
            row = _Row(bucket, role_pattern=(role,))
            for index in indices:
                self._add(row, index, which)
            result.append(row)
        return result

    def _packed_row(self, indices: Sequence[int], bucket: Bucket) -> _Row:
        row = _Row(bucket, role_pattern=self.roles)
        for index in indices:
            example = self.examples[index]
            if self.layout == "shared_prompt" and _shares_prompt(example, self.window):
                row.add_pair(
                    *(example.prompt, example.responses, index, example.desirable),
                    with_prompt=self.with_prompts,
                )
            else:
                for which in range(len(example.responses)):
                    self._add(row, index, which)
        return row

    def _add(self, row: _Row, index: int, which: int) -> None:
        example = self.examples[index]
        row.add_sequence(
            *(example.prompt, example.responses[which], index, example.desirable),
            with_prompt=self.with_prompts and which == 0,
        )


def _shares_prompt(example: Example, window: int | None) -> bool:
    lengths = np.array([[len(response) for response in example.responses]])
    return bool(shares_prompt(np.array([len(example.prompt)]), lengths, window)[0])


class _Row:
    """One row under construction: arrays of the bucket's sizes, and their fill positions."""

    def __init__(self, bucket: Bucket, role_pattern: tuple[SlotRole, ...]) -> None:
        tokens, responses, slots = bucket.tokens, bucket.responses, bucket.slots
        self.input_ids = np.zeros(tokens, np.int64)
        self.position_ids = np.zeros(tokens, np.int64)
        self.key_start = np.arange(tokens, dtype=np.int32)
        self.key_stop = self.key_start + 1
        self.response_positions = np.zeros(responses, np.int64)
        self.labels = np.full(responses, IGNORE_LABEL, np.int64)
        self.slot_index = np.zeros(responses, np.int64)
        self.slot_valid = np.zeros(slots, np.bool_)
        # Empty slots have roles too, so that paired slots stay paired; slot_valid masks them.
        self.slot_role = np.resize(np.array(role_pattern, np.int64), slots)
        self.desirable = np.ones(slots, np.bool_)
        self.record_index = np.full(slots, -1, np.int64)
        self._token = self._response = self._slot = 0

    def add_sequence(
        self, prompt: Tokens, response: Tokens, index: int, desirable: bool, *, with_prompt: bool
    ) -> None:
        """A prompt and a response, in reading order."""
        first = self._token
        context = self._reserve(len(prompt) - 1)
        answer = self._reserve(len(response))
        if with_prompt:
            self._add_prompt_labels(prompt, context)
        self._lay(np.concatenate([prompt, response[:-1]]), np.r_[context, answer])
        self.key_start[first : self._token] = first
        self._add_response(response, answer, index, desirable)

    def add_pair(
        self,
        prompt: Tokens,
        responses: Sequence[Tokens],
        index: int,
        desirable: bool,
        *,
        with_prompt: bool,
    ) -> None:
        """A prompt without its last token, once: before it the first response, last token first, and
        behind it the second. Each begins with the prompt's last token."""
        chosen, rejected = responses
        before = self._reserve(len(chosen))
        context = self._reserve(len(prompt) - 1)
        behind = self._reserve(len(rejected))
        if with_prompt:
            self._add_prompt_labels(prompt, context)
        backwards = before[::-1]
        # The last prompt token predicts the first response token, so each response has its own copy of it, at
        # its usual position; the response's last token is only predicted.
        self._lay(np.concatenate([prompt, chosen[:-1]]), np.r_[context, backwards])
        self._lay(np.concatenate([prompt[-1:], rejected[:-1]]), behind, first_position=len(prompt) - 1)
        # A token of the first response sees those behind it, which precede it, and all of the prompt.
        self.key_start[before], self.key_stop[before] = before, behind[0]
        self.key_start[context] = self.key_start[behind] = behind[0] - len(context)
        self._add_response(chosen, backwards, index, desirable)
        self._add_response(rejected, behind, index, desirable)

    def _reserve(self, tokens: int) -> Tokens:
        """Indices of the row's next tokens."""
        self._token += tokens
        return np.arange(self._token - tokens, self._token)

    def _lay(self, tokens: Tokens, places: Tokens, first_position: int = 0) -> None:
        """Tokens in reading order, at these indices of the row."""
        self.input_ids[places] = tokens
        self.position_ids[places] = np.arange(first_position, first_position + len(tokens))

    def _add_prompt_labels(self, prompt: Tokens, context: Tokens) -> None:
        """The prompt's tokens from the second on, for the likelihood of the slot that comes next."""
        self._add_labels(prompt[1:], context, len(self.slot_valid) + self._slot)

    def _add_response(self, response: Tokens, places: Tokens, index: int, desirable: bool) -> None:
        self._add_labels(response, places, self._slot)
        self.slot_valid[self._slot] = True
        self.desirable[self._slot] = desirable
        self.record_index[self._slot] = index
        self._slot += 1

    def _add_labels(self, labels: Tokens, places: Tokens, slot: int) -> None:
        """``labels`` in reading order, each predicted from the token at its index of the row."""
        taken = slice(self._response, self._response + len(labels))
        self.response_positions[taken] = places
        self.labels[taken] = labels
        self.slot_index[taken] = slot
        self._response += len(labels)


_ROW_FIELDS = [
    "input_ids",
    "position_ids",
    "key_start",
    "key_stop",
    "response_positions",
    "labels",
    "slot_index",
    "slot_valid",
    "slot_role",
    "desirable",
    "record_index",
]


def _to_batch(rows: Sequence[_Row], counts: GlobalCounts) -> Batch:
    stacked = {name: torch.from_numpy(np.stack([getattr(r, name) for r in rows])) for name in _ROW_FIELDS}
    return Batch(
        **stacked,
        global_pairs=torch.tensor(float(counts.examples)),
        global_tokens=torch.tensor(float(counts.tokens)),
    )
