"""Response positions out of rows of a static shape."""

from __future__ import annotations

import pytest
import torch

from nxdt_align.ops.ragged import ModelInputs, PaddedRows


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rows", [1, 3])
def test_response_positions_are_those_of_each_row(rows: int, dtype: torch.dtype) -> None:
    """In values and gradients, where positions repeat, as a shared prompt's last token and padding do."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 7, 5, generator=generator, requires_grad=True)
    positions = torch.tensor([[6, 0, 3, 3], [0, 0, 0, 0], [5, 4, 3, 6]], dtype=dtype)[:rows]
    weights = torch.randn(rows, 4, 5, generator=generator)
    nothing = torch.zeros(rows, 7, dtype=dtype)
    inputs = ModelInputs(nothing, nothing, nothing, nothing, positions, positions)
    found = PaddedRows(inputs).at_responses(hidden)
    (gradient,) = torch.autograd.grad((found * weights).sum(), hidden)
    wanted = torch.stack([hidden[row][positions[row].long()] for row in range(rows)])
    (wanted_gradient,) = torch.autograd.grad((wanted * weights).sum(), hidden)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
