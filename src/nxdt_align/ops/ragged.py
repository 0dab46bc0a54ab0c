"""The tokens that a model runs over: a batch's rows as they are, or its real tokens in one row.

The latter is for eager devices: padding costs nothing where no shape is compiled.
Legend: ``K`` real tokens, ``M`` response tokens, of all rows together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, PADDING_SEGMENT, SEGMENT_STRIDE, Batch


class ModelInputs(NamedTuple):
    """What of a batch a model reads; shapes as in Batch."""

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
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
    def segment_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...

    def at_responses(self, hidden: Tensor) -> Tensor:
        """(*labels' shape, D): the hidden states from which the labels are predicted."""
        ...

    def spread(self, values: Tensor) -> Tensor:
        """A value, or several, a label -> (B, T, ...), 0 where there is no response token."""
        ...


class PaddedRows:
    """A batch's rows as they are: static shapes."""

    def __init__(self, inputs: ModelInputs) -> None:
        self.input_ids, self.position_ids, self.segment_ids, self._positions, self.labels = inputs

    def at_responses(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, T, D)."""
        return hidden.gather(1, self._positions[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def spread(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class RaggedRow:
    """What the model reads, without the places that hold nothing."""

    input_ids: Tensor
    """(1, K) int64"""
    position_ids: Tensor
    """(1, K) int64"""
    segment_ids: Tensor
    """(1, K) int64. Examples of different rows have different ids."""
    response_positions: Tensor
    """(M,) int64. Index into the row from which a response token is predicted."""
    labels: Tensor
    """(M,) int64. The token predicted there."""
    _places: Tensor
    """(M,) int64. Where in the flattened (B, T) each response token stands."""
    _shape: torch.Size

    @classmethod
    def of(cls, batch: ModelInputs) -> RaggedRow:
        rows, size = batch.segment_ids.shape
        is_real = batch.segment_ids.reshape(-1) != PADDING_SEGMENT
        kept = is_real.nonzero().squeeze(1)
        row = torch.arange(rows, device=kept.device)[:, None]
        # A row has no more examples than tokens.
        apart = (batch.segment_ids + row * SEGMENT_STRIDE * size).reshape(-1)
        places = (batch.labels.reshape(-1) != IGNORE_LABEL).nonzero().squeeze(1)
        flat_positions = (batch.response_positions + row * size).reshape(-1)[places]
        new_position = is_real.cumsum(0) - 1
        return cls(
            input_ids=batch.input_ids.reshape(-1)[kept][None],
            position_ids=batch.position_ids.reshape(-1)[kept][None],
            segment_ids=apart[kept][None],
            response_positions=new_position[flat_positions],
            labels=batch.labels.reshape(-1)[places],
            _places=places,
            _shape=batch.labels.shape,
        )

    def at_responses(self, hidden: Tensor) -> Tensor:
        """(1, K, D) -> (M, D)."""
        return hidden[0].index_select(0, self.response_positions)

    def spread(self, values: Tensor) -> Tensor:
        """(M, ...) -> (B, T, ...), 0 where there is no response token."""
        zeros = values.new_zeros((self._shape.numel(), *values.shape[1:]))
        return zeros.index_copy(0, self._places, values).view(*self._shape, *values.shape[1:])
