"""What is said of models and settings that transformers' path does not take, and of what it falls back to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_fixture import ALONE, BASE, VALUES, config_of, write_model
from small_tokenizers import make_tokenizer
from training_fixture import Project, scalars

from nxdt_align.cli import main
from nxdt_align.errors import UserError
from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.config import ModelConfigError
from nxdt_align.models.presets import DecoderConfig, model_of
from nxdt_align.run.conversion import convert
from nxdt_align.weights.peft import require_peft_names


def start(root: Path, name: str, **changes: Any) -> tuple[Project, list[str]]:
    project, tokenizer = Project.create(root), make_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    write_model(root / "start", config_of(name, vocab_size=len(tokenizer), **ids, **changes), tokenizer)
    folder = root / "start"
    return project, [f"model.model_config={folder}", f"exp_manager.resume_from_checkpoint={folder}"]


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is a model with an encoder and a decoder"),
        (
            {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "llama"}},
            r"llava is a model of images or sounds.*save its text model \(llama\) by itself",
        ),
        ({"model_type": "nothing_known"}, "nothing_known is no causal model that the installed transformers"),
        ({"model_type": "nothing_known", "auto_map": {}}, "set model.trust_remote_code: True"),
        (
            VALUES["mixtral"] | {"quantization_config": {"quant_method": "gptq"}},
            "quantised by GPTQModel.*adapters train on a quantised base",
        ),
        (
            VALUES["mixtral"] | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type` dynamic chooses frequencies by the longest position of a batch",
        ),
        ({"model_type": 3}, "`model_type` must name a model of transformers, but is 3"),
    ],
)
def test_what_no_model_can_be_trained_of_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelConfigError, match=said):
        model_of(values, "transformers")


def test_values_that_transformers_refuses_are_a_config_error() -> None:
    config = TransformersConfig.of(VALUES["gpt2"] | {"n_head": "many"})
    with pytest.raises(ModelConfigError, match=r"config\.json: transformers cannot read it: .*n"):
        _ = config.hf


def test_auto_takes_our_decoder_where_it_covers_the_family() -> None:
    llama = BASE | {"model_type": "llama"}
    assert isinstance(model_of(llama), DecoderConfig)
    assert isinstance(model_of(llama, "transformers"), TransformersConfig)
    assert isinstance(model_of(VALUES["gpt2"]), TransformersConfig)
    assert isinstance(model_of(model_of(llama, "transformers").to_record()), TransformersConfig)
    with pytest.raises(ModelConfigError, match=r"`model_type` must be one of llama, .*, but is gpt2"):
        model_of(VALUES["gpt2"], "ours")


def test_an_unknown_rope_type_of_our_own_family_is_named() -> None:
    rope = {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}
    with pytest.raises(
        ModelConfigError, match=r"must be one of default, linear, llama3, yarn, but is spiral"
    ):
        model_of(BASE | {"model_type": "llama"} | rope)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_a_model_that_is_not_causal_is_refused(name: str) -> None:
    if name == "mpnet":
        with pytest.raises(ModelConfigError, match="mpnet is no causal model that the installed"):
            model_of({"model_type": "mpnet"}, "transformers")
        return
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TransformersConfig.of({"model_type": "bert", "vocab_size": 64, **small})
    with pytest.raises(UserError, match="BertLMHeadModel is no causal model"):
        _ = config.findings


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("stablelm", "its layers do not hand on to attention what the model is given"),
        ("falcon", "its class takes no attention but its own"),
        ("llama4", "rows of several texts give other results"),
    ],
)
def test_why_a_model_takes_no_rows_of_several_texts(name: str, why: str) -> None:
    found = config_of(name).findings
    assert found.refusal is not None and why in found.refusal
    assert name in ALONE


def test_unknown_arguments_of_attention_are_refused() -> None:
    """GPT-OSS has sinks, which its attention gets as an argument that ours does not know."""
    config = TransformersConfig.of(
        BASE | {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    )
    assert config.findings.refusal == "its attention asks for s_aux, which ours does not do"


def test_a_model_that_takes_no_layout_trains_on_one_response_per_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, given = start(tmp_path, "stablelm")
    assert project.train(*given, "trainer.max_steps=2", "data.packing=shared_prompt") == 0
    said = "".join(capsys.readouterr())
    assert "transformers' StableLmForCausalLM computes the model" in said
    assert "data.packing: none, a row for each response, instead of shared_prompt" in said
    losses = [value for _, value in scalars(project.only_run())["reduced_train_loss"]]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)


PEFT = "model_alignment_strategy.peft"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("distributed_strategy.engine=nxd", "a gpt2 is computed by transformers: set"),
        ("model.num_layers=1", "model.num_layers: cannot override the config.json of a gpt2"),
        ("model.router_aux_loss_coef=0.1", "has no balancing loss of a router; set it to 0"),
        ("model.implementation=ours", "`model_type` must be one of llama"),
        ("model.implementation=theirs", "model.implementation"),
        (f"{PEFT}.quantize_base=nf4", "peft.quantize_base: must not be set for a gpt2 that transformers"),
        (f"{PEFT}.target_modules=[q_proj]", "There are: c_attn, c_fc, c_proj, and all-linear; a pattern"),
        (
            f"{PEFT}.rank=64",
            "must be at most 32, the smaller side of the weight of transformer.h.0.attn.c_attn",
        ),
        (f"{PEFT}.modules_to_save=[wte]", "must not name wte for a model whose head is tied to it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    more: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, given = start(tmp_path, "gpt2")
    assert project.train(*given, more) != 0
    assert said in " ".join(capsys.readouterr().err.split())


def test_experts_have_no_adapters() -> None:
    """They are one tensor of three dimensions; what is a linear layer of its own may have one."""
    config = config_of("mixtral")
    for name in ("experts", "gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        with pytest.raises(
            UserError, match=f"{name} .*is no linear layer of one weight.*There are: k_proj, o_"
        ):
            adapter_spec(config, target_modules=[name], rank=2, alpha=4)
    with pytest.raises(UserError, match=r"modules_to_save=\[gate\] trains it whole"):
        adapter_spec(config, target_modules=["gate"], rank=2, alpha=4)
    deepseek = config_of("deepseek_v3")
    spec = adapter_spec(deepseek, target_modules=["all-linear"], rank=2, alpha=4)
    assert "model.layers.1.mlp.shared_experts.up_proj" in spec.targets
    with pytest.raises(
        UserError, match="PEFT takes down_proj, gate_proj, up_proj of a deepseek_v3 for its exp"
    ):
        require_peft_names(deepseek, spec, "export")
    # A router that is called as a linear layer and is none.
    assert not any("router" in path for path in config_of("llama4").linear_layers().sizes)


def test_a_config_that_contradicts_its_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, given = start(tmp_path, "mixtral")
    change(tmp_path / "start", num_local_experts=8)
    assert project.train(*given) != 0
    said = capsys.readouterr().err
    assert "mlp.experts.down_proj" in said and "must have shape" in said


def test_shards_of_nxd_are_not_written(tmp_path: Path) -> None:
    _, _ = start(tmp_path, "gpt2")
    with pytest.raises(UserError, match="--to nxdt: NxD has no gpt2, which transformers computes"):
        convert(tmp_path / "start", tmp_path / "shards", to="nxdt", quiet=True)
    report = convert(tmp_path / "start", tmp_path / "native", to="native", quiet=True)
    assert report.verified
    convert(tmp_path / "native", tmp_path / "again", to="hf", dtype="bf16", quiet=True)
    auto: Any = __import__("transformers").AutoModelForCausalLM
    before, after = (auto.from_pretrained(tmp_path / f).state_dict() for f in ("start", "again"))
    assert all(after[name].equal(value.to(torch.bfloat16)) for name, value in before.items())


def test_plan_says_what_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project, given = start(tmp_path, "gpt2")
    arguments = ["--config-path", str(project.root / "conf"), "--config-name", "run"]
    assert main(["plan", *arguments, *given]) == 0
    said = capsys.readouterr().out
    assert "for a gpt2 of" in said and "activations, which are not estimated" in said
    assert main(["plan", *arguments, *given, f"{PEFT}.rank=2"]) == 0
    # 2 layers of 2 (32 + 96) + 2 (32 + 32) + 2 (32 + 48) + 2 (48 + 32) values.
    assert f"frozen weights and {2 * (256 + 128 + 160 + 160):,} of adapters" in capsys.readouterr().out


CODE = """
from transformers import GPT2Config, GPT2LMHeadModel


class OwnConfig(GPT2Config):
    model_type = "own"


class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_a_folders_own_code_is_run_where_the_yaml_says_so_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, given = start(tmp_path, "gpt2")
    folder = tmp_path / "start"
    (folder / "own.py").write_text(CODE)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(folder, model_type="own", auto_map=names, architectures=["OwnModel"])
    assert project.train(*given) != 0
    assert "which is not run: read it, and set model.trust_remote_code: True" in capsys.readouterr().err
    assert project.train(*given, "model.trust_remote_code=True", "trainer.max_steps=2") == 0
    said = "".join(capsys.readouterr())
    assert "is run with the rights of this process" in said and "OwnModel computes the model" in said
