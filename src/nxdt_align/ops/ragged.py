"""The tokens that a model runs over: a batch's rows as they are, or its real tokens in one row.

The latter is for eager devices: padding costs nothing where no shape is compiled.
Legend: ``K`` real tokens, ``M`` response tokens, of all rows together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, Batch


class ModelInputs(NamedTuple):
    """What of a batch a model reads; shapes as in Batch."""

    input_ids: Tensor
    position_ids: Tensor
    key_start: Tensor
    key_stop: Tensor
    response_positions: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch: Batch) -> ModelInputs:
        return cls(*(getattr(batch, name) for name in cls._fields))


class Rows(Protocol):
    """Tokens that a model runs over."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def key_start(self) -> Tensor: ...
    @property
    def key_stop(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...

    def at_responses(self, hidden: Tensor) -> Tensor:
        """(*labels' shape, D): the hidden states from which the labels are predicted."""
        ...

    def at_tokens(self, values: Tensor) -> Tensor:
        """(B, S), a value per token of the batch -> one per token here, in ``input_ids``' shape."""
        ...

    def spread(self, values: Tensor) -> Tensor:
        """A value, or several, a label -> (B, T, ...), 0 where there is no response token."""
        ...


class PaddedRows:
    """A batch's rows as they are: static shapes."""

    def __init__(self, inputs: ModelInputs) -> None:
        self.input_ids, self.position_ids = inputs.input_ids, inputs.position_ids
        self.key_start, self.key_stop = inputs.key_start, inputs.key_stop
        self.labels, self._positions = inputs.labels, inputs.response_positions

    def at_responses(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, T, D)."""
        # Not gather, which XLA does element by element, in both passes: D times as many descriptors.
        rows, size, width = hidden.shape
        firsts = torch.arange(0, rows * size, size, dtype=self._positions.dtype, device=hidden.device)
        index = (self._positions + firsts[:, None]).flatten()
        return hidden.flatten(0, 1).index_select(0, index).view(*self._positions.shape, width)

    def at_tokens(self, values: Tensor) -> Tensor:
        return values

    def spread(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class RaggedRow:
    """What the model reads, without padding."""

    input_ids: Tensor
    """(1, K) int64"""
    position_ids: Tensor
    """(1, K) int64"""
    key_start: Tensor
    """(1, K) int32. Bounds of the keys that each token sees, counted over all rows together."""
    key_stop: Tensor
    """(1, K) int32"""
    response_positions: Tensor
    """(M,) int64. Index into the row from which a response token is predicted."""
    labels: Tensor
    """(M,) int64. The token predicted there."""
    _places: Tensor
    """(M,) int64. Where in the flattened (B, T) each response token stands."""
    _shape: torch.Size
    _tokens: Tensor
    """(K,) int64. Where in the flattened (B, S) each token stands."""

    @classmethod
    def of(cls, batch: ModelInputs) -> RaggedRow:
        size = batch.input_ids.shape[1]
        index = torch.arange(size, device=batch.input_ids.device)
        has_label = batch.labels != IGNORE_LABEL
        # Padding comes last, and a row's last token predicts a label: the bounds of padding, [s, s + 1), may
        # be those of a prompt of one token too.
        used = torch.where(has_label, batch.response_positions + 1, 0).amax(1)
        kept = (index < used[:, None]).reshape(-1).nonzero().squeeze(1)
        # Rows move up by the padding before them, and with them all that counts tokens.
        shift = (used.cumsum(0) - used)[:, None]
        places = has_label.reshape(-1).nonzero().squeeze(1)
        return cls(
            input_ids=batch.input_ids.reshape(-1)[kept][None],
            position_ids=batch.position_ids.reshape(-1)[kept][None],
            key_start=(batch.key_start + shift).to(torch.int32).reshape(-1)[kept][None],
            key_stop=(batch.key_stop + shift).to(torch.int32).reshape(-1)[kept][None],
            response_positions=(batch.response_positions + shift).reshape(-1)[places],
            labels=batch.labels.reshape(-1)[places],
            _places=places,
            _shape=batch.labels.shape,
            _tokens=kept,
        )

    def at_responses(self, hidden: Tensor) -> Tensor:
        """(1, K, D) -> (M, D)."""
        return hidden[0].index_select(0, self.response_positions)

    def at_tokens(self, values: Tensor) -> Tensor:
        """(B, S) -> (1, K)."""
        return values.reshape(-1)[self._tokens][None]

    def spread(self, values: Tensor) -> Tensor:
        """(M, ...) -> (B, T, ...), 0 where there is no response token."""
        zeros = values.new_zeros((self._shape.numel(), *values.shape[1:]))
        return zeros.index_copy(0, self._places, values).view(*self._shape, *values.shape[1:])
