"""A YAML, its overrides and its interpolations become one configuration."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yamls

from nxdt_align.config.faults import ConfigError
from nxdt_align.config.load import find_config, load_config, rewrite_override, to_yaml
from nxdt_align.config.schema import Config, DataSource
from nxdt_align.errors import UserError

Load = Callable[..., Config]


@pytest.mark.parametrize("text", yamls.ALL.values(), ids=yamls.ALL)
def test_documented_forms_load_without_an_edit(load: Load, text: str) -> None:
    load(text)


@pytest.mark.parametrize("name", ["hf_llama3_8B_DPO_config", "hf_llama3_8B_ORPO_config.yaml"])
def test_shipped_yamls_hold_the_documented_values(repo: Path, name: str) -> None:
    config = load_config(name, [], repo / "conf")
    assert (config.trainer.devices, config.distributed_strategy.tensor_model_parallel_size) == (32, 32)
    assert config.exp_manager.checkpoint_callback_params.model_parallel_size == 32
    assert config.trainer.check_val_every_n_epoch is None
    assert config.trainer.limit_val_batches == 0.0
    assert config.data.seq_length == 4096
    assert config.precision.type == "mixed_precision"
    assert config.model.optim.sched is not None and config.model.optim.sched.max_steps == 5000
    strategy = config.model_alignment_strategy
    if strategy.objective == "dpo":
        assert strategy.dpo is not None and strategy.dpo.kl_beta == 0.01
        assert config.model.encoder_seq_length == 8192
        assert config.model.optim.lr == 5.0e-7
    else:
        assert strategy.orpo is not None and strategy.orpo.beta == 0.1
        assert config.model.optim.lr == 1.5e-4
        assert config.model.optim.sched.name == "CosineAnnealing"


@pytest.mark.parametrize("objective", ["DPO", "ORPO", "SFT"])
def test_tiny_yamls_follow_the_demo_folder(
    repo: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"tiny_llama_{objective}_config"
    file = "sft.jsonl" if objective == "SFT" else "train.jsonl"
    assert load_config(name, [], repo / "conf").data.train_dir == f"demo_run/data/{file}"
    monkeypatch.setenv("NXDT_DEMO_DIR", "/elsewhere")
    config = load_config(name, [], repo / "conf")
    assert config.data.tokenizer.type == "/elsewhere/tokenizer"
    assert config.model_alignment_strategy.objective == objective.lower()
    assert config.world_size == 1


def test_interpolations_are_resolved(load: Load) -> None:
    config = load(yamls.SFT_WITH_LORA)
    assert config.data.seq_length == 4096
    assert config.model.max_position_embeddings == 4096
    assert load(yamls.PRETRAINING).exp_manager.checkpoint_callback_params.model_parallel_size == 128


def test_home_is_expanded_in_paths(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(yamls.SFT_WITH_LORA)
    assert config.data.train_dir == "/home/someone/training.jsonl"
    assert config.data.tokenizer.type == "/home/someone/tokenizer"
    assert config.model.model_config == "/home/someone/config.json"


def test_empty_yaml_gives_every_default(load: Load) -> None:
    assert load("") == Config()


def test_printed_yaml_loads_as_the_same_configuration(load: Load) -> None:
    for text in yamls.ALL.values():
        config = load(text, "data.columns={prompt: question}", "data.buckets=[64,128]")
        assert load(to_yaml(config)) == config


def test_given_keys_are_remembered_and_do_not_count_in_comparison(load: Load) -> None:
    config = load("seed: 1\nmodel: {optim: {lr: 1.0, betas: [0.9, 0.95]}, fusions: {softmax: True}}")
    assert config.given == {"seed", "model.optim.lr", "model.optim.betas", "model.fusions.softmax"}
    assert dataclasses.replace(config, given=frozenset()) == config


# Other spellings


def test_encoder_seq_len_is_encoder_seq_length(load: Load) -> None:
    assert load(yamls.TUTORIAL_ORPO).model.encoder_seq_length == 4096
    text = "model: {encoder_seq_len: 512, max_position_embeddings: '${.encoder_seq_length}'}"
    assert load(text).model.max_position_embeddings == 512


def test_an_override_may_use_either_spelling(load: Load) -> None:
    assert load("model: {encoder_seq_length: 512}", "model.encoder_seq_len=64").model.encoder_seq_length == 64
    config = load("", "async_exec_max_inflight_requests=3", "exp_manager.exp_log_dir=/logs")
    assert (config.aync_exec_max_inflight_requests, config.exp_manager.explicit_log_dir) == (3, "/logs")


def test_two_spellings_that_differ_are_a_fault(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"another spelling of model.encoder_seq_length, which is 64"):
        load("model: {encoder_seq_length: 64, encoder_seq_len: 128}")
    assert load("model: {encoder_seq_length: 64, encoder_seq_len: 64}").model.encoder_seq_length == 64


# Defaults that follow from other keys


def test_seq_length_follows_encoder_seq_length(load: Load) -> None:
    assert load("model: {encoder_seq_length: 8192}").data.seq_length == 8192
    assert load("model: {encoder_seq_length: 8192}", "data.seq_length=64").data.seq_length == 64


def test_max_prompt_length_is_2048_or_half_of_a_shorter_sequence(load: Load) -> None:
    def limit(text: str) -> int:
        return load(text).model_alignment_strategy.max_prompt_length

    strategy = "model_alignment_strategy: {orpo: {}}"
    assert limit(f"data: {{seq_length: 8192}}\n{strategy}") == 2048
    assert limit(f"data: {{seq_length: 64}}\n{strategy}") == 32
    assert limit("data: {seq_length: 64}\nmodel_alignment_strategy: {orpo: {max_prompt_length: 40}}") == 40


# Overrides


def test_overrides_set_keys_that_the_yaml_does_not_have(load: Load) -> None:
    config = load(
        yamls.TUTORIAL_DPO,
        *("trainer.max_steps=7", "model.optim.lr=3e-4", "model.optim.weight_decay=0.1"),
        *("model.optim.sched={name: StepLR, step_size: 5}", "+data.packing=none", "++seed=5"),
        *("~model_alignment_strategy.dpo", "model_alignment_strategy.orpo.beta=0.2"),
    )
    assert (config.trainer.max_steps, config.model.optim.lr, config.seed) == (7, 3e-4, 5)
    assert config.model.optim.params == {"weight_decay": 0.1}
    assert config.model.optim.sched is not None
    assert config.model.optim.sched.settings() == {"step_size": 5}
    assert config.data.packing == "none"
    assert config.model_alignment_strategy.objective == "orpo"


@pytest.mark.parametrize(
    "path",
    [
        "/a b/(c)[0]=1,{2}.jsonl",
        'it\'s "quoted"',
        "~user",
        "back\\slash\\",
        "a\\'b",
        "#x: y",
        "null.jsonl",
        "007",
    ],
)
def test_a_path_needs_no_quotes_in_an_override(load: Load, path: str) -> None:
    assert load("", f"data.train_dir={path}").data.train_dir == path


def test_quoted_empty_and_null_overrides_of_a_text(load: Load) -> None:
    text = "seed: 1234\nexp_manager: {exp_dir: /x, explicit_log_dir: /y}"
    config = load(text, "exp_manager.exp_dir=null", "data.train_dir='a b'", "name=${seed}x")
    assert (config.exp_manager.exp_dir, config.data.train_dir, config.name) == (None, "a b", "1234x")


def test_a_mixture_in_an_override(load: Load) -> None:
    config = load("", "data.train_dir=[{path: a.jsonl, weight: 2}, b.jsonl]")
    assert config.data.train_dir == (DataSource(path="a.jsonl", weight=2.0), DataSource(path="b.jsonl"))


def test_an_interpolated_value_follows_the_override(repo: Path) -> None:
    config = load_config("hf_llama3_8B_DPO_config", ["trainer.max_steps=3"], repo / "conf")
    assert config.model.optim.sched is not None and config.model.optim.sched.max_steps == 3


def test_override_forms() -> None:
    assert rewrite_override("seed=1") == "++seed=1"
    assert rewrite_override("++seed=1") == "++seed=1"
    assert rewrite_override("+seed=1") == "+seed=1"
    assert rewrite_override("~data.val_dir") == "~data.val_dir"
    assert rewrite_override("name=a b") == "++name='a b'"


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("trainer.max_steps", "'trainer.max_steps' cannot be read"),
        ("trainer.max_steps=[1", "trainer.max_steps=[1"),
        ("~data.nothing", "does not exist"),
        ("trainer=5", "trainer=5"),
    ],
)
def test_a_bad_override_is_named(load: Load, override: str, fault: str) -> None:
    with pytest.raises(UserError) as error:
        load(yamls.TUTORIAL_DPO, "name=fine", override)
    assert fault in str(error.value)
    assert "Overrides are key=value" in str(error.value)


@pytest.mark.parametrize("override", ["seed=1,2", "seed=range(1,3)", "seed=choice(1,2)"])
def test_a_sweep_is_refused_with_what_works(load: Load, override: str) -> None:
    with pytest.raises(UserError) as error:
        load("", "name=fine", override)
    message = str(error.value)
    assert message.startswith(
        f"seed: must be one value, but is '{override.partition('=')[2]}'; start one run"
    )
    assert "A list is written seed=[a,b]" in message
    assert "multirun" not in message


# Files


def test_a_config_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    file = tmp_path / "conf" / "hf_llama3.1_8B.yaml"
    file.write_text("seed: 1")
    monkeypatch.chdir(tmp_path)
    for name in ("hf_llama3.1_8B", "hf_llama3.1_8B.yaml", str(file), "conf/hf_llama3.1_8B"):
        assert find_config(name) == file
        assert load_config(name).seed == 1
    assert find_config("hf_llama3.1_8B", tmp_path / "conf") == file


def test_an_unknown_config_names_what_there_is(repo: Path) -> None:
    with pytest.raises(UserError) as error:
        load_config("hf_llama3_8B_DP0_config", [], repo / "conf")
    message = str(error.value)
    assert "no config 'hf_llama3_8B_DP0_config'" in message
    assert "did you mean hf_llama3_8B_DPO_config?" in message
    assert "tiny_llama_ORPO_config" in message


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("trainer:\n  devices: 1\n  max_steps: [1\nseed: 1\n", "given.yaml, line 4, column"),
        ("trainer:\n\tdevices: 1\n", "line 2, column 1: not valid YAML"),
        ("seed: 1\nseed: 2\n", "line 2, column 1: not valid YAML: found duplicate key seed"),
        ("- a\n- b\n", "must hold sections and keys, but holds a list"),
        ("just words", "just words: is not a known key"),
        ("name: ${seed", "given.yaml"),
        ("name: \x01", "not valid YAML"),
    ],
)
def test_a_broken_yaml_is_named_with_its_place(load: Load, text: str, fault: str) -> None:
    with pytest.raises(UserError) as error:
        load(text)
    assert fault in str(error.value)


def test_a_yaml_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("name: é".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_config(str(file))


# Faults


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("learning_rate=1e-5", "learning_rate: is not a known key; here it is model.optim.lr"),
        ("loss.beta=0.1", "loss.beta: is not a known key; here it is model_alignment_strategy.dpo.kl_beta"),
        ("loss.name=dpo", "loss.name: is not a known key; the objective is a section, model_alignment_str"),
        ("loss=dpo", "loss: is not a known key; the objective is a section, model_alignment_strategy.dpo"),
        ("criterion.config.beta=1", "criterion.config.beta: is not a known key; here it is model_alignment_"),
        ("loss.label_smoothing=0", "did you mean model_alignment_strategy.dpo.label_smoothing?"),
        ("optimizer.config.lr=1", "optimizer.config.lr: is not a known key; here it is model.optim.lr"),
        ("gradient_accumulation_steps=4", "data.global_batch_size is pairs per step over all ranks"),
        ("trainer.max_length=4", "trainer.max_length: is not a known key; here it is data.seq_length"),
        ("exp_manger.name=x", "exp_manger: is not a known key; did you mean exp_manager?"),
        ("model_alignment_strategy.dpo.beta=1", "did you mean model_alignment_strategy.dpo.kl_beta?"),
    ],
)
def test_another_librarys_name_gets_ours(load: Load, override: str, fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("", override)
    assert fault in str(error.value)
    assert len(error.value.faults) == 1


def test_all_faults_come_in_one_message(load: Load) -> None:
    text = """
trainer: {max_step: 5, devices: many}
data: {micro_batch_size: 1.5, seq_lenght: 64, tokenizer: gpt2, on_bad_record: skip}
model: {micro_batch_size: 1, fusions: [softmax], max_position_embeddings: '${.nothing}', hidden_size: '???'}
model_alignment_strategy: {dpo: {kl_beta: high, loss_type: ippo, truncation_mode: keep_strat}}
precision: {type: bf16}
"""
    with pytest.raises(ConfigError) as error:
        load(text)
    faults = {fault.path: str(fault) for fault in error.value.faults}
    assert faults["trainer.max_step"].endswith("is not a known key; did you mean trainer.max_steps?")
    assert faults["trainer.devices"].endswith("must be an integer, but is 'many'")
    assert faults["data.micro_batch_size"].endswith("must be an integer, but is 1.5")
    assert faults["data.seq_lenght"].endswith("did you mean data.seq_length?")
    assert faults["data.tokenizer"].endswith("must be a section of keys, but is 'gpt2'")
    assert faults["data.on_bad_record"].endswith("must be one of error, drop, but is 'skip'")
    assert faults["model.micro_batch_size"].endswith("did you mean data.micro_batch_size?")
    assert faults["model.fusions"].endswith("must be a section of keys, but is ['softmax']")
    assert "cannot be resolved" in faults["model.max_position_embeddings"]
    assert "cannot be resolved" in faults["model.hidden_size"]
    assert faults["model_alignment_strategy.dpo.kl_beta"].endswith("must be a number, but is 'high'")
    assert "but is 'ippo'; did you mean ipo?" in faults["model_alignment_strategy.dpo.loss_type"]
    assert faults["model_alignment_strategy.dpo.truncation_mode"].endswith("did you mean keep_start?")
    assert "must be one of fp32, bf16SR," in faults["precision.type"]
    assert len(faults) == 14
    assert str(error.value).startswith(f"14 faults in {error.value.source}:\n  - ")
    assert all(text in str(error.value) for text in faults.values())


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {searchpath: ['pkg://search_path_package']}",
        "hydra: {searchpath: 'pkg://search_path_package'}",
        "hydra: {searchpath: ['${name}']}\nname: pkg://search_path_package",
        "hydra: ${x}\nx: {searchpath: ['pkg://search_path_package']}",
        "x: &x {searchpath: ['file:///tmp', 'pkg://search_path_package']}\nhydra: {<<: *x}",
    ],
)
def test_no_package_is_imported_because_a_yaml_searches_it(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "search_path_package").mkdir()
    (tmp_path / "search_path_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"hydra.searchpath: must be folders, as file:///folder, but is"):
        load(text)
    assert "search_path_package" not in sys.modules
    assert load(f"hydra: {{searchpath: ['file://{tmp_path}'], run: {{dir: .}}}}\nseed: 3").seed == 3


SECRETS = """
name: x
data:
    train_dir: $MY_SECRET/train.jsonl
    val_dir: [{path: "$MY_SECRET/a", weight: 1}]
    tokenizer: {type: "${oc.env:TOKENIZER_DIR}"}
    columns: {prompt: "${exp_manager.wandb_logger_kwargs.key}"}
exp_manager:
    wandb_logger_kwargs:
        {key: "${oc.env:WANDB_API_KEY}", name: "of ${.key}", more: ["${oc.env:my_password,none}"]}
    mlflow_logger_kwargs: {a.b: "${oc.env:DB_PASS}", pwd: "${oc.env:PWD}"}
model: {optim: {lr: "${oc.decode:${oc.env:PASSWORD_OF_LR}}"}}
trainer: {callbacks: [{path: my.Watch, settings: {login: "${oc.env:WANDB_API_KEY}"}}]}
"""


def test_secrets_are_used_and_not_shown(
    load: Load, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"MY_SECRET": "hush-one", "WANDB_API_KEY": "hush-two", "DB_PASS": "hush-three"}
    values |= {"PASSWORD_OF_LR": "0.125", "TOKENIZER_DIR": "/a/tokenizer", "PWD": "/a/folder"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    config = load(SECRETS)
    assert config.data.train_dir == "hush-one/train.jsonl"
    assert config.exp_manager.wandb_logger_kwargs == {
        "key": "hush-two",
        "name": "of hush-two",
        "more": ["none"],
    }
    shown = to_yaml(config)
    assert "hush" not in shown and "0.125" not in shown
    assert "$MY_SECRET/train.jsonl" in shown and "${oc.env:WANDB_API_KEY}" in shown
    assert "/a/tokenizer" in shown and "/a/folder" in shown
    assert load(shown) == config
    with pytest.raises(ConfigError) as error:
        load(SECRETS, "seed=${oc.env:WANDB_API_KEY}", "trainer.devices=[${oc.env:DB_PASS}]")
    assert "hush" not in str(error.value) and "seed: must be an integer, but is '${oc.env:WANDB" in str(
        error.value
    )


# Adapters


def test_adapters_have_nxdts_keys_and_their_short_names(load: Load) -> None:
    peft = load("model_alignment_strategy: {dpo: {}, peft: {rank: 8, alpha: 16, dropout: 0}}")
    found = peft.model_alignment_strategy.peft
    assert found is not None and (found.lora_rank, found.lora_alpha, found.lora_dropout) == (8, 16, 0)
    assert load("", "model_alignment_strategy.peft.rank=4").model_alignment_strategy.peft is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model_alignment_strategy.peft.r=8", "model_alignment_strategy.peft.lora_rank"),
        ("model_alignment_strategy.peft.use_dora=True", "did you mean model_alignment_strategy.peft.dora?"),
        ("model.apply_lora_to_mlp=True", "model_alignment_strategy.peft.target_modules names the layers"),
        ("model.lora_attn_modules=[q_proj]", "model_alignment_strategy.peft.target_modules names the layers"),
    ],
)
def test_other_libraries_names_of_adapters_are_understood(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("", f"+{override}")
    assert message in str(error.value)
