"""Planned rows -> Batch: the only code that knows the position of each token in a layout.

Legend as in batch.py. In every layout a response segment starts with its prompt's last token and
lacks its own last token, so the next token is always the next position, and none is seen twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nxdt_align.batch import IGNORE_LABEL, PADDING_SEGMENT, SEGMENT_STRIDE, Batch, SlotRole
from nxdt_align.data.packing import Bucket, Layout
from nxdt_align.data.tokenize import Example


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
                example = self.examples[index]
                row.add_sequence(
                    *(example.prompt, [example.responses[which]], index, example.desirable),
                    with_prompt=self.with_prompts and which == 0,
                )
            result.append(row)
        return result

    def _packed_row(self, indices: Sequence[int], bucket: Bucket) -> _Row:
        row = _Row(bucket, role_pattern=self.roles)
        for index in indices:
            example = self.examples[index]
            # Shared: one segment group with all responses. Packed: each response repeats its prompt.
            shared = self.layout == "shared_prompt"
            for which, responses in enumerate([example.responses] if shared else zip(example.responses)):
                row.add_sequence(
                    *(example.prompt, responses, index, example.desirable),
                    with_prompt=self.with_prompts and which == 0,
                )
        return row


class _Row:
    """One row under construction: arrays of the bucket's sizes, and their fill positions."""

    def __init__(self, bucket: Bucket, role_pattern: tuple[SlotRole, ...]) -> None:
        tokens, responses, slots = bucket.tokens, bucket.responses, bucket.slots
        self.input_ids = np.zeros(tokens, np.int64)
        self.position_ids = np.zeros(tokens, np.int64)
        self.segment_ids = np.full(tokens, PADDING_SEGMENT, np.int64)
        self.response_positions = np.zeros(responses, np.int64)
        self.labels = np.full(responses, IGNORE_LABEL, np.int64)
        self.slot_index = np.zeros(responses, np.int64)
        self.slot_valid = np.zeros(slots, np.bool_)
        # Empty slots have roles too, so that paired slots stay paired; slot_valid masks them.
        self.slot_role = np.resize(np.array(role_pattern, np.int64), slots)
        self.desirable = np.ones(slots, np.bool_)
        self.record_index = np.full(slots, -1, np.int64)
        self._token = self._response = self._slot = self._example = 0

    def add_sequence(
        self,
        prompt: npt.NDArray[Any],
        responses: Sequence[npt.NDArray[Any]],
        index: int,
        desirable: bool,
        *,
        with_prompt: bool,
    ) -> None:
        """Add the prompt without its last token, once, then each response preceded by that token."""
        segment = self._example * SEGMENT_STRIDE
        if with_prompt:
            self._add_labels(prompt[1:], len(self.slot_valid) + self._slot)
        self._add_tokens(prompt[:-1], 0, segment)
        for part, response in enumerate(responses, start=1):
            self._add_labels(response, self._slot)
            # The last prompt token predicts the first response token, so each response has its own copy of
            # it, at its usual position; the response's last token is only predicted.
            self._add_tokens(np.concatenate([prompt[-1:], response[:-1]]), len(prompt) - 1, segment + part)
            self.slot_valid[self._slot] = True
            self.desirable[self._slot] = desirable
            self.record_index[self._slot] = index
            self._slot += 1
        self._example += 1

    def _add_labels(self, labels: npt.NDArray[Any], slot: int) -> None:
        """Add ``labels``, to be predicted from the tokens that are added next."""
        place = slice(self._response, self._response + len(labels))
        self.response_positions[place] = np.arange(self._token, self._token + len(labels))
        self.labels[place] = labels
        self.slot_index[place] = slot
        self._response += len(labels)

    def _add_tokens(self, tokens: npt.NDArray[Any], first_position: int, segment: int) -> None:
        place = slice(self._token, self._token + len(tokens))
        self.input_ids[place] = tokens
        self.position_ids[place] = np.arange(first_position, first_position + len(tokens))
        self.segment_ids[place] = segment
        self._token += len(tokens)


_ROW_FIELDS = [
    "input_ids",
    "position_ids",
    "segment_ids",
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
