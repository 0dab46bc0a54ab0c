"""Each family against transformers' own model of it, on the same weights, in fp32 on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_fixture import BASE, CONFIGS, VALUES, draw, window
from torch import Tensor
from torch.nn import functional as F

from nxdt_align.models.decoder import Decoder
from nxdt_align.models.families import FAMILIES
from nxdt_align.models.presets import (
    DecoderConfig,
    RopeScaling,
    from_hf_dict,
    read_config_json,
    weight_shapes,
)
from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.weights.names import hf_tensors, parts_of

TOKENS = 24
SHORT = 7
"""A window that the rows exceed."""
SHAPES: dict[str, DecoderConfig] = {name: window(config, SHORT) for name, config in CONFIGS.items()}
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=64)
SHAPES |= {
    "yarn": replace(CONFIGS["qwen3"], rope_scaling=YARN),
    "yarn, all keys": replace(
        CONFIGS["qwen2"],
        rope_scaling=replace(
            YARN, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.2, truncate=False
        ),
    ),
    "yarn, attention factor": replace(CONFIGS["olmo2"], rope_scaling=replace(YARN, attention_factor=1.3)),
    "qwen2, llama3 rope": replace(CONFIGS["qwen2"], rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    "qwen3, biases": replace(CONFIGS["qwen3"], qkv_bias=True, output_bias=True),
    "gemma2, untied": replace(CONFIGS["gemma2"], tie_word_embeddings=False, sliding_window=SHORT),
    "olmo2, multi-query": replace(CONFIGS["olmo2"], num_key_value_heads=1),
}


def build(config: DecoderConfig, attention: Attention | None = None) -> Decoder:
    model = Decoder(config, attention or DenseAttention())
    draw(model, 0, 0.2)
    return model


def theirs(config: DecoderConfig, model: Decoder) -> Any:
    """transformers' model with the same weights, put together by the family's own names."""
    import transformers

    hf_config = transformers.AutoConfig.for_model(**config.to_hf_dict(), attn_implementation="eager")
    auto: Any = transformers.AutoModelForCausalLM
    hf = auto.from_config(hf_config).float()
    assert type(hf).__name__ == config.family.architecture
    tensors = model.state_dict()
    stacked = {name: torch.cat([tensors[p] for p in parts]) for name, parts in hf_tensors(config).items()}
    missing, unexpected = hf.load_state_dict(stacked, strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()
    return hf.eval()


def inputs(config: DecoderConfig, start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, positions, and bounds of two rows of one sequence each."""
    ids = torch.randint(config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    index = torch.arange(TOKENS, dtype=torch.int32).expand(2, -1)
    return ids, index.long() + start, torch.zeros_like(index), index + 1


def ours(model: Decoder, start: int = 0) -> Tensor:
    ids, positions, *bounds = inputs(model.config, start)
    attention: Any = model.model.layers[0].self_attn.core_attn._attend  # type: ignore[union-attr]
    context = model.model.prepare(*bounds, attention.prepare)
    return model.logits(model(ids, positions, context))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_equal_those_of_transformers(name: str) -> None:
    """To 1e-5, at positions from 0 and, where these are past a scaling's first context, from 200."""
    config = SHAPES[name]
    model = build(config)
    hf = theirs(config, model)
    for start in (200, 0):
        ids, positions, *_ = inputs(config, start)
        logits = ours(model, start)
        expected = hf(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert float(logits.detach().std()) > 0.5
    torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    torch.autograd.backward(F.cross_entropy(expected.flatten(0, 1), ids.flatten()))
    gradients = {n: p.grad for n, p in hf.named_parameters()}
    found = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.abs().max() > 1e-6 for g in found.values())
    for their_name, parts in hf_tensors(config).items():
        got = torch.cat([found[part] for part in parts])  # type: ignore[misc]
        torch.testing.assert_close(got, gradients[their_name], rtol=0, atol=1e-5, msg=their_name)
    assert set(gradients) == set(hf_tensors(config))


@pytest.mark.parametrize("name", ["gemma2", "qwen2, windows"])
def test_backends_agree(name: str) -> None:
    config = SHAPES[name]
    wanted = ours(build(config))
    torch.testing.assert_close(ours(build(config, BlockAttention())), wanted, rtol=0, atol=1e-5)
    with torch.no_grad():
        got = ours(build(config, FlexAttention(compiled=False)))
    torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VALUES)
def test_every_weight_has_its_name_and_shape(name: str) -> None:
    config = CONFIGS[name]
    model = Decoder(config, DenseAttention())
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == weight_shapes(config)
    assert list(dict(model.named_parameters())) == list(weight_shapes(config))
    tensors = hf_tensors(config)
    assert [part for hf in tensors for part in parts_of(hf, config.model_type)] == list(weight_shapes(config))


def test_every_family_is_tested() -> None:
    assert {values["model_type"] for values in VALUES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_goes_through_transformers_and_back(name: str, tmp_path: Path) -> None:
    """Written by us, read by transformers, written by it, read by us; and ours read again."""
    import transformers

    config = SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()))
    assert read_config_json(tmp_path) == config
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert read_config_json(tmp_path / "again") == config
    # As transformers 4 writes it.
    values = {k: v for k, v in config.to_hf_dict().items() if k != "rope_parameters"}
    assert from_hf_dict(values) == config


NAMED_ALIKE = (
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    import transformers

    least = {
        key: BASE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    least |= {"num_attention_heads": 32, "hidden_size": 256, "model_type": model_type}
    got = from_hf_dict(least)
    want = transformers.AutoConfig.for_model(**least)
    for key in NAMED_ALIKE:
        assert getattr(got, key) == getattr(want, key), key
    assert got.head_dim == (getattr(want, "head_dim", None) or 256 // 32)
    rope = want.rope_parameters
    full = rope.get("full_attention", rope)
    assert got.rope_theta == full["rope_theta"]
    if got.local_rope_theta is not None:
        assert got.local_rope_theta == rope["sliding_attention"]["rope_theta"]
    types = getattr(want, "layer_types", None)
    if types is not None:
        assert [got.window_of(i) is None for i in range(4)] == [t == "full_attention" for t in types]
    if got.attention_scale is not None:
        assert got.attention_scale == want.query_pre_attn_scalar**-0.5
        assert got.attention_softcap == want.attn_logit_softcapping
        assert got.logits_softcap == want.final_logit_softcapping
        assert got.sliding_window == want.sliding_window
        assert got.activation == want.hidden_activation
