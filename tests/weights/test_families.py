"""Conversions of every family: there and back is the identity, and transformers loads an export."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import run, same_folders
from families_fixture import BASE, CONFIGS, draw, window
from safetensors.torch import load_file, save_file

from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig, ModelConfigError, parameter_count
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.run.conversion import open_weights
from nxdt_align.weights.detect import open_source
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.inspect import describe_bare

SIZES: tuple[dict[str, Any], ...] = (
    {"tp": 2, "qkv_linear": True, "pp": 2},
    {"tp": 4, "kv_multiplier": 2, "qkv_linear": True, "fuse_qkv": True},
    {"tp": 2, "pp": 3, "xser": True},
)


def model_of(config: DecoderConfig) -> Decoder:
    model = Decoder(config, DenseAttention())
    draw(model, 0, 0.2)
    return model


def write(folder: Path, config: DecoderConfig, **options: Any) -> Decoder:
    model = model_of(config)
    write_hf_folder(folder, config, model.state_dict(), **options)
    return model


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_identity(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = write(tmp_path / "hf", config, max_shard_bytes=20_000)
    run(tmp_path / "hf", tmp_path / "nxdt", to="nxdt", **sizes)
    run(tmp_path / "nxdt", tmp_path / "back", to="hf")
    same_folders(tmp_path / "hf", tmp_path / "back")
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    assert before == after
    source, found = open_weights(tmp_path / "nxdt")
    assert found == config
    for tensor_name, tensor in model.named_parameters():
        assert source.read(tensor_name).equal(tensor), tensor_name


def test_one_coalesced_layer_with_biases(tmp_path: Path) -> None:
    """Of as many kv heads as query heads."""
    write(tmp_path / "hf", replace(CONFIGS["qwen2"], num_key_value_heads=4))
    run(tmp_path / "hf", tmp_path / "nxdt", to="nxdt", tp=2, coalesce_qkv=True)
    run(tmp_path / "nxdt", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_gives_the_same_logits_in_transformers(name: str, tmp_path: Path) -> None:
    """And the folder that transformers then saves is read as the same weights."""
    import transformers

    config = window(CONFIGS[name], 7)
    model = write(tmp_path / "hf", config)
    auto: Any = transformers.AutoModelForCausalLM
    loaded, report = auto.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.randint(config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    index = torch.arange(20, dtype=torch.int32)[None]
    context = model.model.prepare(torch.zeros_like(index), index + 1, DenseAttention().prepare)
    with torch.no_grad():
        ours = model.logits(model(ids, index.long(), context))
        torch.testing.assert_close(loaded.eval()(ids).logits, ours, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "saved")
    same_folders(tmp_path / "hf", tmp_path / "saved")
    assert open_source(tmp_path / "saved")[1] == config


def test_a_part_of_a_fused_weight_is_read_by_itself(tmp_path: Path) -> None:
    """Rows and columns of it, as a rank of a sharded model does."""
    model = write(tmp_path / "hf", CONFIGS["phi3"])
    source = HFFolder(tmp_path / "hf")
    for name in ("self_attn.qkv_proj.k_proj", "self_attn.qkv_proj.v_proj", "mlp.gate_up_proj.up_proj"):
        weight = model.get_parameter(f"model.layers.2.{name}.weight")
        for region in (slice(3, 9), slice(0, 32)), (slice(4, 5), slice(7, 20)), (slice(2, 2), slice(0, 3)):
            assert source.read_slice(f"model.layers.2.{name}.weight", region).equal(weight[region])
    held = load_file(tmp_path / "hf" / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" not in held
    assert held["model.layers.0.self_attn.qkv_proj.weight"].shape == (64, 32)


CONTRADICTIONS = {
    "biases that config.json does not have": (
        "llama",
        {"attention_bias": False},
        r"surplus: model.layers.\{0-3\}.self_attn.k_proj.bias",
    ),
    "no biases, of another family": (
        "phi3",
        {"num_key_value_heads": 4},
        "has the shape .64, 32., but its parts",
    ),
    "fewer layers": ("qwen3", {"num_hidden_layers": 2}, r"surplus: model.layers.\{2-3\}"),
    "other heads": ("qwen3", {"head_dim": 8}, "q_norm.weight"),
    "another family": (
        "olmo2",
        {"model_type": "llama"},
        r"no LlamaForCausalLM has: .*post_feedforward_layernorm",
    ),
    "norms of another family": ("qwen3", {"model_type": "llama"}, "surplus: model.layers.*q_norm"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_configuration_that_contradicts_its_weights(case: str, tmp_path: Path) -> None:
    name, changes, fault = CONTRADICTIONS[case]
    write(tmp_path / "hf", CONFIGS[name])
    values = json.loads((tmp_path / "hf" / "config.json").read_text()) | changes
    if "num_hidden_layers" in changes:
        values.pop("layer_types")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError) as error:
        open_source(tmp_path / "hf")
    assert re.search(fault, str(error.value)), error.value


def test_a_fused_weight_has_one_dtype(tmp_path: Path) -> None:
    tensors = model_of(CONFIGS["phi3"]).state_dict()
    name = "model.layers.1.self_attn.qkv_proj.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    with pytest.raises(
        WeightsError, match=r"become one tensor, model.layers.1.self_attn.qkv_proj.weight, but"
    ):
        write_hf_folder(tmp_path / "hf", CONFIGS["phi3"], tensors)
    assert not (tmp_path / "hf").exists()


def test_a_family_that_is_not_known_is_named(tmp_path: Path) -> None:
    save_file({"transformer.wte.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "gpt9"}))
    with pytest.raises(ModelConfigError, match=r"`model_type` gpt9 is no causal model that the installed"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "olmo2", "gemma2"])
def test_shards_without_a_configuration_count_each_weight_once(name: str, tmp_path: Path) -> None:
    write(tmp_path / "hf", CONFIGS[name])
    run(tmp_path / "hf", tmp_path / "nxdt", to="nxdt", **SIZES[1])
    described = describe_bare(tmp_path / "nxdt")
    assert described["parameters"] == parameter_count(CONFIGS[name])
