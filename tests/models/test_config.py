"""Shapes: config.json in both spellings, overrides, rules, counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nxdt_align.errors import UserError
from nxdt_align.models.families import FAMILIES
from nxdt_align.models.presets import (
    KNOWN_MODELS,
    LLAMA3_1_8B,
    LLAMA3_2_1B,
    LLAMA3_8B,
    PRESETS,
    TINY,
    DecoderConfig,
    ModelConfigError,
    RopeScaling,
    from_hf_dict,
    parameter_count,
    read_config_json,
)

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(**changes: Any) -> DecoderConfig:
    return from_hf_dict({k: v for k, v in (BASE | changes).items() if v != "absent"})


def test_published_sizes() -> None:
    """8.03 and 1.24 billion, as on the model cards; by hand for the 8B.

    A layer: q and o 2 * 4096^2, k and v 2 * 1024 * 4096, MLP 3 * 14336 * 4096, norms 2 * 4096
    = 218,112,000. Times 32, plus embedding and head 2 * 128256 * 4096, plus the last norm 4096.
    """
    assert parameter_count(LLAMA3_8B) == 32 * 218_112_000 + 2 * 128256 * 4096 + 4096 == 8_030_261_248
    assert parameter_count(LLAMA3_1_8B) == parameter_count(LLAMA3_8B)
    assert parameter_count(LLAMA3_2_1B) == 1_235_814_400


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_missing_keys_have_the_defaults_of_transformers(model_type: Any) -> None:
    import transformers

    ours = from_hf_dict(BASE | {"model_type": model_type, "num_attention_heads": 8, "sliding_window": None})
    theirs = transformers.AutoConfig.for_model(
        **(BASE | {"model_type": model_type, "num_attention_heads": 8})
    )
    for key in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    for key in ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("rotary", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, RopeScaling("linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_theta": 5e5, "rope_parameters": LLAMA3}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_both_spellings_of_rotary_settings(rotary: Any, theta: float, scaling: RopeScaling | None) -> None:
    config = read(**rotary)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_llama3_context_defaults_to_the_files_own_and_survives_an_override() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = read(max_position_embeddings=4096, rope_scaling=scaling).with_overrides(
        max_position_embeddings=512
    )
    assert config.max_position_embeddings == 512
    assert config.rope_scaling is not None and config.rope_scaling.original_max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"vocab_size": "absent"}, "`vocab_size` is missing"),
        ({"hidden_size": "wide"}, "`hidden_size` must be an integer, but is wide"),
        ({"hidden_size": 4.5}, "`hidden_size` must be an integer, but is 4.5"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` must be an integer, but is true"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be positive, but is 0"),
        ({"hidden_size": 34}, "`hidden_size` must be a multiple of `num_attention_heads` (4), but is 34"),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` must divide `num_attention_heads` (4), but is 3"),
        ({"head_dim": 7}, "`head_dim` must be even (rotary embedding), but is 7"),
        ({"rms_norm_eps": "small"}, "`rms_norm_eps` must be a finite number, but is small"),
        ({"rms_norm_eps": 0}, "`rms_norm_eps` must be positive, but is 0"),
        ({"initializer_range": -1}, "`initializer_range` must not be negative, but is -1"),
        ({"tie_word_embeddings": "yes"}, "`tie_word_embeddings` must be true or false, but is yes"),
        (
            {"eos_token_id": "</s>"},
            "`eos_token_id` must be an integer, a list of integers or null, but is </s>",
        ),
        ({"model_type": "gpt2"}, f"`model_type` must be one of {', '.join(FAMILIES)}, but is gpt2"),
        ({"model_type": ["llama"]}, 'but is ["llama"]'),
        ({"model_type": "t5", "is_encoder_decoder": True}, "but is t5, a model with an encoder; only"),
        (
            {"model_type": "gemma3", "vision_config": {}, "text_config": {"model_type": "gemma3_text"}},
            "but is gemma3, a model of images or sounds; of those nothing is trained here. Its text model is "
            "gemma3_text: save that by itself",
        ),
        ({"hidden_act": "gelu"}, "`hidden_act` must be one of silu, gelu_pytorch_tanh, but is gelu"),
        (
            {"model_type": "gemma2", "hidden_activation": "relu"},
            "`hidden_activation` must be one of silu, gelu_pytorch_tanh, but is relu",
        ),
        ({"attention_bias": 1}, "`attention_bias` must be true or false, but is 1"),
        ({"mlp_bias": "no"}, "`mlp_bias` must be true or false, but is no"),
        (
            {"model_type": "mistral", "num_key_value_heads": 4, "attention_bias": True},
            "`attention_bias` must be false (no other is supported), but is true",
        ),
        (
            {"model_type": "phi3", "resid_pdrop": 0.1},
            "`resid_pdrop` must be 0 (no other is supported), but is 0.1",
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.4},
            "`partial_rotary_factor` must be above 0, at most 1, and rotate an even part of head_dim (8), "
            "but is 0.4",
        ),
        (
            {"model_type": "gemma3_text", "num_key_value_heads": 4, "layer_types": ["full_attention"]},
            "`layer_types` must be a list of num_hidden_layers (2) of full_attention or sliding_attention",
        ),
        (
            {"model_type": "gemma2", "num_key_value_heads": 4, "layer_types": ["full_attention", "other"]},
            "`layer_types` must be a list of num_hidden_layers (2)",
        ),
        (
            {"model_type": "gemma2", "num_key_value_heads": 4, "sliding_window": None},
            "`sliding_window` must be an integer for layers of sliding_attention, but is null",
        ),
        (
            {
                "model_type": "qwen2",
                "num_key_value_heads": 4,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "`use_sliding_window` must be true where layer_types has sliding_attention, but is false",
        ),
        (
            {"model_type": "gemma2", "num_key_value_heads": 4, "query_pre_attn_scalar": 0},
            "`attention_scale` must be positive, but is 0.0",
        ),
        (
            {"model_type": "gemma2", "num_key_value_heads": 4, "final_logit_softcapping": -1},
            "`logits_softcap` must be positive, but is -1.0",
        ),
        (
            {"model_type": "gemma3_text", "num_key_value_heads": 4, "use_bidirectional_attention": True},
            "`use_bidirectional_attention` must be false (no other is supported), but is true",
        ),
        (
            {
                "model_type": "gemma3_text",
                "num_key_value_heads": 4,
                "rope_parameters": {"sliding_attention": {"rope_type": "yarn"}},
            },
            "`rope_parameters.sliding_attention.rope_type` must be one of default, but is yarn",
        ),
        (
            {
                "model_type": "gemma3_text",
                "num_key_value_heads": 4,
                "rope_local_base_freq": 5e3,
                "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}},
            },
            "`rope_local_base_freq and rope_parameters.sliding_attention.rope_theta` must be equal",
        ),
        ({"attention_dropout": 0.1}, "`attention_dropout` must be 0 (no other is supported), but is 0.1"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1"),
        (
            {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
            "`quantization_config` must be absent (give unquantised weights), which gptq has quantised, but",
        ),
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 2}},
            "`rope_scaling.rope_type` must be one of default, linear, llama3, yarn, but is ntk",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "`rope_scaling.type` must be one of default, linear, llama3, yarn (that choose their frequencies "
            "once, where dynamic does by the longest position of a batch, so that packing would change "
            "results), but is dynamic",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": "quick"}},
            "`rope_scaling.beta_fast` must be a finite number, but is quick",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "factor": 2}},
            "`rope_scaling.type` must be one of default (that choose",
        ),
        ({"rope_scaling": "linear"}, "`rope_scaling` must be an object or null, but is linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "`rope_scaling.factor` is missing"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
            "`rope_scaling.factor` must be at least 1",
        ),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, "`rope_parameters.factor` is missing"),
        (
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 1}},
            "`rope_parameters.high_freq_factor` must be above low_freq_factor (1.0), but is 1.0",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "`rope_theta and rope_parameters.rope_theta` must be equal where several are given",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "`rope_scaling and rope_parameters` must say the same where both are given",
        ),
        ({"rope_theta": float("inf")}, "`rope_theta` must be a finite number, but is Infinity"),
        (
            {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 0},
            "`sliding_window` must be positive, but is 0",
        ),
    ],
)
def test_a_fault_is_named_with_key_rule_and_value(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ModelConfigError) as error:
        read(**changes)
    assert fault in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, UserError)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ModelConfigError) as error:
        read(vocab_size="absent", hidden_act="relu", num_key_value_heads=3, head_dim=5)
    message = str(error.value)
    assert message.startswith("config.json has 4 faults:\n")
    assert all(key in message for key in ("vocab_size", "hidden_act", "num_key_value_heads", "head_dim"))


def test_rules_hold_for_a_shape_made_in_code() -> None:
    with pytest.raises(ModelConfigError, match="needs factor, low_freq_factor"):
        replace(TINY, rope_scaling=RopeScaling("llama3", 8.0))
    with pytest.raises(ModelConfigError, match="`vocab_size` must be positive, but is -1"):
        replace(TINY, vocab_size=-1)


def test_every_layer_of_a_mistral_has_its_window() -> None:
    values = BASE | {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 512}
    config = from_hf_dict(values)
    assert config.to_hf_dict()["sliding_window"] == 512
    assert [config.window_of(layer) for layer in range(2)] == [512, 512]
    assert from_hf_dict({k: v for k, v in values.items() if k != "sliding_window"}).sliding_window == 4096
    assert from_hf_dict(values | {"sliding_window": None}).sliding_window is None
    # A Llama has no window, whatever its file says.
    assert read(sliding_window=16).sliding_window is None


def test_overrides_are_those_of_nxdt() -> None:
    config = LLAMA3_8B.with_overrides(
        num_layers=4, hidden_size=2048, rope_theta=1e4, max_position_embeddings=512
    )
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (4, 2048, 64)
    assert (config.rope_theta, config.max_position_embeddings, config.intermediate_size) == (1e4, 512, 14336)
    assert LLAMA3_8B.with_overrides() == LLAMA3_8B
    # The file's own hidden_size, as NxDT's YAMLs repeat it, leaves a head_dim that is not derived from it.
    odd = replace(TINY, head_dim=16)
    assert odd.with_overrides(hidden_size=TINY.hidden_size) == odd


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ({"num_layers": 0}, "`num_layers` must be positive, but is 0"),
        ({"hidden_size": 30}, r"`hidden_size` must be a multiple of `num_attention_heads` \(4\), but is 30"),
        ({"hidden_size": -32}, "`hidden_size` must be positive, but is -32"),
        ({"hidden_size": 12}, "`head_dim` must be even .* but is 3"),
        ({"rope_theta": 0.0}, "`rope_theta` must be positive, but is 0.0"),
        ({"max_position_embeddings": -1}, "`max_position_embeddings` must be positive, but is -1"),
    ],
)
def test_bad_overrides_are_named(override: dict[str, Any], fault: str) -> None:
    with pytest.raises(ModelConfigError, match=fault):
        TINY.with_overrides(**override)


ROUND_TRIPS = PRESETS | {
    "linear": replace(TINY, rope_scaling=RopeScaling("linear", 2.0)),
    "several ends": replace(TINY, eos_token_id=(5, 7), bos_token_id=None, pad_token_id=3),
    "mistral": replace(TINY, model_type="mistral", sliding_window=4096, rope_theta=1e6),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_written_and_read_again(name: str, tmp_path: Path) -> None:
    config = ROUND_TRIPS[name]
    values = config.to_hf_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config_json(tmp_path) == config
    assert read_config_json(tmp_path / "config.json") == config
    for spelling in ("rope_parameters", "rope_scaling"):
        without = {key: value for key, value in values.items() if key != spelling}
        assert from_hf_dict(without) == config


def test_known_models_have_the_parameters_that_their_authors_name() -> None:
    """In billions, from the models' pages."""
    counts = {name: round(parameter_count(config) / 1e9, 2) for name, config in KNOWN_MODELS.items()}
    assert counts == {
        "meta-llama/Meta-Llama-3-8B": 8.03,
        "meta-llama/Meta-Llama-3-8B-Instruct": 8.03,
        "meta-llama/Llama-3.1-8B": 8.03,
        "meta-llama/Llama-3.1-70B-Instruct": 70.55,
        "meta-llama/Llama-3.2-1B-Instruct": 1.24,
        "mistralai/Mistral-7B-v0.1": 7.24,
        "alignment-handbook/zephyr-7b-sft-full": 7.24,
        "Qwen/Qwen2.5-7B-Instruct": 7.62,
        "Qwen/Qwen3-8B": 8.19,
        "microsoft/Phi-3-mini-4k-instruct": 3.82,
        "allenai/OLMo-2-1124-7B-SFT": 7.3,
        "google/gemma-2-9b-it": 9.24,
        "google/gemma-3-12b-it": 11.77,
    }


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    """Written by us, read by transformers' AutoConfig, written by it, read by us."""
    import transformers

    config = ROUND_TRIPS[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    family = config.model_type.capitalize().replace("_text", "Text")
    assert type(theirs).__name__ == f"{family}Config"
    rotary = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert rotary["rope_theta"] == config.rope_theta
    assert (theirs.head_dim, theirs.tie_word_embeddings) == (config.head_dim, config.tie_word_embeddings)
    theirs.save_pretrained(tmp_path / "again")
    assert "rope_scaling" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert read_config_json(tmp_path / "again") == config


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "no model configuration at .*config.json: give a Hugging Face config.json"),
        ("{", "config.json cannot be read as JSON"),
        ("[1]", "must hold a JSON object, but holds a list"),
        ('{"model_type": "llama"}', "config.json has 5 faults:"),
    ],
)
def test_unreadable_files_are_named(content: str | None, fault: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelConfigError, match=fault):
        read_config_json(tmp_path)
