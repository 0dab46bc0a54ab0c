"""Which modules of a decoder get an adapter, and what a fresh one is."""

from __future__ import annotations

import re

import pytest
import torch

from nxdt_align.errors import UserError
from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.models.adapters import adapter_shapes, fresh_factor, merged_weight
from nxdt_align.models.presets import TINY
from nxdt_align.models.sharding import REPLICATED, ROW, split_of

LAYER = "model.layers.0."


def targets(*names: str) -> set[str]:
    """Of the first layer."""
    spec = adapter_spec(TINY, target_modules=names, rank=2, alpha=4)
    return {path.removeprefix(LAYER) for path in spec.targets if path.startswith(LAYER)}


def test_names_ends_of_paths_patterns_and_nxdts_names() -> None:
    assert targets("q_proj") == {"self_attn.qkv_proj.q_proj"}
    assert targets("qkv_proj") == {f"self_attn.qkv_proj.{part}_proj" for part in "qkv"}
    assert targets("gate_up_proj") == {f"mlp.gate_up_proj.{part}_proj" for part in ("gate", "up")}
    assert targets("layers.0.mlp.down_proj") == {"mlp.down_proj"}
    assert targets("model.layers.[01].self_attn.(q|v)_proj") == {
        "self_attn.qkv_proj.q_proj",
        "self_attn.qkv_proj.v_proj",
    }
    assert len(targets("all-linear")) == 7


def test_a_pattern_may_choose_layers() -> None:
    spec = adapter_spec(TINY, target_modules=["model.layers.1.*"], rank=2, alpha=4)
    assert len(spec.targets) == 7
    assert all(path.startswith("model.layers.1.") for path in spec.targets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["wq"]},
            "'wq' names no module of this model; did you mean q_proj? There are: down_proj, gate_proj",
        ),
        ({"target_modules": ["("]}, "'(' names no module"),
        ({"target_modules": ["lm_head"]}, "modules_to_save=[lm_head] trains it whole"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["head"]}, "There are: down_proj, embed_tokens"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]},
            "either trained whole or has an adapter",
        ),
        (
            {"target_modules": ["all-linear"], "rank": 17},
            "must be at most 16, the smaller side of the weight of",
        ),
        ({"target_modules": []}, "must name a layer"),
    ],
)
def test_what_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        adapter_spec(TINY, **({"rank": 2, "alpha": 4.0} | settings))  # type: ignore[arg-type]


def test_the_factor_across_the_split_is_split_with_the_weight() -> None:
    assert split_of(f"{LAYER}mlp.down_proj.lora_A") == ROW
    assert split_of(f"{LAYER}mlp.down_proj.lora_B") == REPLICATED
    assert split_of(f"{LAYER}self_attn.qkv_proj.k_proj.lora_A") == REPLICATED
    name = f"{LAYER}self_attn.qkv_proj.k_proj"
    assert split_of(f"{name}.lora_B") == split_of(f"{name}.start_lora_B") == split_of(f"{name}.weight")
    assert split_of("lm_head.trained_weight") == split_of("lm_head.weight")


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_fresh_adapter_changes_nothing_and_follows_from_seed_and_name(init: str) -> None:
    """As PEFT draws them: uniform within 1 / sqrt(inputs), or normal of 1 / rank."""
    spec = adapter_spec(TINY, target_modules=["all-linear"], rank=8, alpha=4, init=init)  # type: ignore[arg-type]
    for name, shape in adapter_shapes(TINY, spec).items():
        factor = fresh_factor(name, shape, spec, 1)
        assert factor.equal(fresh_factor(name, shape, spec, 1))
        if name.endswith("lora_B"):
            assert not factor.any()
        else:
            assert not factor.equal(fresh_factor(name, shape, spec, 2))
            std = shape[1] ** -0.5 / 3**0.5 if init == "kaiming" else 1 / 8
            assert float(factor.std()) == pytest.approx(std, rel=0.15)


def test_rslora_scales_by_the_roots_rank() -> None:
    assert adapter_spec(TINY, target_modules=["q_proj"], rank=4, alpha=8).scale == 2
    assert adapter_spec(TINY, target_modules=["q_proj"], rank=4, alpha=8, rslora=True).scale == 4


def test_a_merged_dora_has_rows_of_its_magnitude() -> None:
    weight, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    magnitude = torch.rand(6) + 0.5
    merged = merged_weight(weight, a, b, magnitude, 0.5)
    assert torch.allclose(merged.norm(dim=1), magnitude)
    assert torch.allclose(
        merged / merged[:, :1], (weight + 0.5 * b @ a) / (weight + 0.5 * b @ a)[:, :1], rtol=1e-4
    )
