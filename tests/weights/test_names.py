"""Names: Hugging Face's and ours."""

from __future__ import annotations

import pytest

from nxdt_align.errors import UserError
from nxdt_align.models.presets import LLAMA3_8B, weight_shapes
from nxdt_align.named_tensors import summary
from nxdt_align.weights.names import UnknownNameError, from_hf, is_recomputed, parts_of, to_hf


def test_every_name_goes_there_and_back() -> None:
    names = list(weight_shapes(LLAMA3_8B))
    assert [from_hf(to_hf(name)) for name in names] == names
    assert len({to_hf(name) for name in names}) == len(names)


def test_hugging_faces_names_are_those_of_transformers() -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=11, num_attention_heads=2
    )
    theirs = list(transformers.LlamaForCausalLM(config).state_dict())
    assert [to_hf(from_hf(name)) for name in theirs] == theirs
    assert from_hf("model.layers.10.mlp.up_proj.weight") == "model.layers.10.mlp.gate_up_proj.up_proj.weight"
    assert (
        to_hf("model.layers.7.self_attn.qkv_proj.k_proj.weight") == "model.layers.7.self_attn.k_proj.weight"
    )


def test_names_of_fused_weights_stand_for_their_parts() -> None:
    layer = "model.layers.12"
    assert parts_of(f"{layer}.self_attn.qkv_proj.weight", "phi3") == [
        f"{layer}.self_attn.qkv_proj.{part}_proj.weight" for part in "qkv"
    ]
    assert to_hf(f"{layer}.mlp.gate_up_proj.up_proj.weight", "phi3") == f"{layer}.mlp.gate_up_proj.weight"
    assert parts_of(f"{layer}.mlp.down_proj.weight", "phi3") == [f"{layer}.mlp.down_proj.weight"]
    with pytest.raises(UnknownNameError, match=r"is model.* and model.* and model.* in one tensor"):
        from_hf(f"{layer}.self_attn.qkv_proj.weight", "phi3")
    for name in (
        f"{layer}.self_attn.q_proj.weight",
        "self_attn.qkv_proj.weight",
        f"{layer}.mlp.up_proj.weight",
    ):
        with pytest.raises(UnknownNameError, match="a Hugging Face Phi3 has no weight named"):
            parts_of(name, "phi3")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm.bias",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.*.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.qkv_proj.q_proj.weight",
        "score.weight",
        "",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="a Hugging Face Llama has no weight named"):
        from_hf(name)
    assert issubclass(UnknownNameError, UserError)


def test_our_unknown_names_are_refused() -> None:
    with pytest.raises(
        UnknownNameError, match=r"the plain Llama has no weight named 'model.layers.0.mlp.up_proj"
    ):
        to_hf("model.layers.0.mlp.up_proj.weight")


def test_rotary_frequencies_are_recomputed() -> None:
    assert is_recomputed("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert is_recomputed("model.rotary_emb.inv_freq")
    assert not is_recomputed("model.norm.weight")


def test_summary_joins_layers() -> None:
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (3, 0, 1, 2, 7, 12)]
    assert summary([*names, "lm_head.weight", "model.layers.5.o.weight"]) == [
        "lm_head.weight",
        "model.layers.5.o.weight",
        "model.layers.{0-3,7,12}.mlp.down_proj.weight",
    ]
