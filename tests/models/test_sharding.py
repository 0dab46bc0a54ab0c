"""The table of splits: every weight has one, and its size is that of what it is cut into."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nxdt_align.models.presets import TINY, weight_shapes
from nxdt_align.models.sharding import EACH_HEAD, HEAD_INPUTS, SPLITS, split_of

BIASED = replace(TINY, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm="head")
EVERYTHING = (BIASED, replace(BIASED, qk_norm="projection", norms="both"))
"""Two models that have all weights between them."""


def test_every_weight_is_cut_along_its_unit() -> None:
    """All sizes differ, so that a wrong one shows: heads 4 * 10, kv heads 2 * 10, MLP 64, vocab 128."""
    sizes = {"query_head": 40, "kv_head": 20, "row": 64, "vocab": 128}
    for config in EVERYTHING:
        for name, shape in weight_shapes(replace(config, head_dim=10)).items():
            split = split_of(name)
            if split.dim is None:
                assert split.replicated and len(shape) == 1
                assert (shape == (10,)) == (split == EACH_HEAD), name
            else:
                assert split.unit is not None and shape[split.dim] == sizes[split.unit], name


def test_the_table_has_no_weight_too_many() -> None:
    found = {
        name.replace("layers.0.", "layers.*.").replace("layers.1.", "layers.*.")
        for config in EVERYTHING
        for name in weight_shapes(config)
    }
    assert set(SPLITS) == found


def test_layers_share_a_row() -> None:
    assert split_of("model.layers.31.self_attn.o_proj.weight") == HEAD_INPUTS
    assert split_of("model.layers.0.self_attn.o_proj.weight").dim == 1


def test_unknown_weights_have_no_split() -> None:
    with pytest.raises(KeyError, match="bias"):
        split_of("model.layers.0.input_layernorm.bias")
