"""Each family against transformers' own model of it, on the same weights, in fp32 on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families_fixture import BASE, CONFIGS, VALUES, build, inputs, ours, theirs, window
from torch import Tensor
from torch.nn import functional as F

from nxdt_align.models.decoder import Decoder, ScaledEmbedding
from nxdt_align.models.families import FAMILIES
from nxdt_align.models.presets import (
    DecoderConfig,
    RopeScaling,
    from_hf_dict,
    read_config_json,
    weight_shapes,
)
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.weights.names import hf_tensors, parts_of

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


def gradients_of(model: torch.nn.Module, logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    torch.autograd.backward(F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()))
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", SHAPES)
def test_bf16_is_as_near_to_fp32_as_that_of_transformers(name: str) -> None:
    """Weights and activations in bf16, against the same model in fp32, by the norm of the difference.

    Both models round a few times per layer, at places of their own: logits of either are 1.4 to 2.4% off, the
    whole gradient 2.4 to 7%, and they are as far from each other. Ours may be off by 1.25 times what theirs
    is, the gradient by 1.5 times, and that of one weight, of few numbers, by 2.5 times.
    """
    config = SHAPES[name]
    model = build(config)
    hf = theirs(config, model).bfloat16()
    ids, positions, *_ = inputs(config)
    logits = ours(model)
    wanted = gradients_of(model, logits, ids)
    low = build(config).bfloat16()
    got = ours(low)
    assert got.dtype == torch.bfloat16
    got_gradients = gradients_of(low, got, ids)
    expected = hf(ids, position_ids=positions, use_cache=False).logits
    expected_gradients = gradients_of(hf, expected, ids)

    exact, near, far = (each.detach().float() for each in (logits, got, expected))
    assert off(near, exact) <= 1.25 * off(far, exact)
    assert off(near, far) <= 0.03
    names = hf_tensors(config)
    every: list[tuple[Tensor, Tensor, Tensor]] = []
    for their_name, parts in names.items():
        exact, near = (torch.cat([found[part] for part in parts]) for found in (wanted, got_gradients))
        far = expected_gradients[their_name]
        assert off(near, exact) <= 2.5 * off(far, exact), their_name
        every.append((exact.flatten(), near.flatten(), far.flatten()))
    exact, near, far = (torch.cat(each) for each in zip(*every, strict=True))
    assert off(near, exact) <= 1.5 * off(far, exact)


def test_the_scale_of_an_embedding_is_rounded_to_its_dtype() -> None:
    """As transformers and the published weights have it: the root of 60 is 7.746, and 7.75 in bf16."""
    scale = ScaledEmbedding(replace(CONFIGS["gemma2"], hidden_size=60))
    assert scale(torch.ones(1)).item() == pytest.approx(60**0.5, rel=1e-7)
    assert scale(torch.ones(1, dtype=torch.bfloat16)).item() == 7.75
