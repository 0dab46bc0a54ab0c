"""The table of splits: every weight has one, and its size is that of what it is cut into."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nxdt_align.models.presets import TINY, weight_shapes
from nxdt_align.models.sharding import HEAD_INPUTS, SPLITS, split_of


def test_every_weight_is_cut_along_its_unit() -> None:
    """All sizes differ, so that a wrong one shows: heads 4 * 10, kv heads 2 * 10, MLP 64, vocab 128."""
    config = replace(TINY, head_dim=10)
    sizes = {"query_head": 40, "kv_head": 20, "row": 64, "vocab": 128}
    for name, shape in weight_shapes(config).items():
        split = split_of(name)
        if split.dim is None:
            assert split.replicated and len(shape) == 1
        else:
            assert split.unit is not None and shape[split.dim] == sizes[split.unit], name


def test_the_table_has_no_weight_too_many() -> None:
    found = {
        name.replace("layers.0.", "layers.*.").replace("layers.1.", "layers.*.")
        for name in weight_shapes(TINY)
    }
    assert set(SPLITS) == found


def test_layers_share_a_row() -> None:
    assert split_of("model.layers.31.self_attn.o_proj.weight") == HEAD_INPUTS
    assert split_of("model.layers.0.self_attn.o_proj.weight").dim == 1


def test_unknown_weights_have_no_split() -> None:
    with pytest.raises(KeyError, match="bias"):
        split_of("model.layers.0.self_attn.o_proj.bias")
