"""Files and folders that are not there, or not what they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from config_checks import check

from nxdt_align.config.schema import Config
from nxdt_align.config.start import model_config_path

Load = Callable[..., Config]
Reject = Callable[..., str]
PIPELINE = "distributed_strategy.pipeline_model_parallel_size"
VIRTUAL = "distributed_strategy.virtual_pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        (
            "data.train_dir=nowhere.jsonl",
            "data.train_dir: must be a file or folder that exists, but is 'nowhere.jsonl'",
        ),
        ("data.train_dir=/no/where", "data.train_dir: must be a file or folder that exists"),
        ("data.train_dir=org/file.jsonl", "data.train_dir: must be a file or folder that exists"),
        (
            "data.train_dir=[{path: x.jsonl, weight: 0}]",
            "data.train_dir.0.weight: must be above 0, but is 0.0",
        ),
        ("data.train_dir=[{weight: 1}]", "data.train_dir.0.path: is required"),
        ("data.val_dir=/no/val.jsonl", "data.val_dir: must be a file or folder that exists"),
        ("data.tokenizer.type=/no/tokenizer", "data.tokenizer.type: must be a folder that exists"),
        ("data.tokenizer.type={files}/weights", "must be a tokenizer's folder, with a tokenizer.json"),
        ("data.tokenizer.type={files}/tokenizer/tokenizer.json", "must be a folder, not a file, but is"),
        ("model.model_config=/no/config.json", "model.model_config: must be a config.json that exists"),
        (
            "model.model_config={files}/weights",
            "model.model_config: must be a config.json that exists, or its folder",
        ),
        ("model.model_config={files}/train.txt", "must be JSON, but"),
        ("model.model_config={files}/list.json", "must be a JSON object"),
        ("model.model_config=null", "weights/config.json does not exist"),
        (
            "exp_manager.resume_from_checkpoint=/no/ckpt",
            "resume_from_checkpoint: must be a folder that exists",
        ),
        ("exp_manager.resume_from_checkpoint={files}/train.jsonl", "must be a folder, not a file"),
        (
            "exp_manager.resume_from_checkpoint={files}/empty",
            "this one is empty; name a Hugging Face folder",
        ),
        (
            "exp_manager.resume_from_checkpoint={files}/weigths",
            "/files/weights?",
        ),
        ("model_alignment_strategy.reference_model=/no/ref", "reference_model: must be a folder that exists"),
        (
            "model.hidden_size=4097",
            "must give a hidden_size that num_attention_heads (32) divides, but is 4097",
        ),
    ],
)
def test_a_wrong_path_is_named(reject: Reject, files: Path, override: str, rule: str) -> None:
    (files / "empty").mkdir()
    (files / "train.txt").write_text("no json")
    (files / "list.json").write_text("[]")
    assert rule in reject(override.replace("{files}", str(files)))


@pytest.mark.parametrize(
    "override",
    [
        "data.train_dir=Anthropic/hh-rlhf",
        "data.train_dir=Anthropic/hh-rlhf:test",
        "data.train_dir=Anthropic/hh-rlhf:train[:10%]",
        "data.tokenizer.type=meta-llama/Llama-3.1-8B",
    ],
)
def test_a_name_on_the_hub_is_no_path(load: Load, good: str, override: str) -> None:
    check(load(good, override))


@pytest.mark.parametrize("path", ["/no/hh-rlhf:test", "hh.jsonl:test", "weights/hh:test"])
def test_a_split_of_what_is_no_name_on_the_hub(
    reject: Reject, files: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    assert "data.train_dir: must be a file or folder that exists" in reject(f"data.train_dir={path}")


def test_what_lies_in_a_folder_that_is_here_is_a_path(
    reject: Reject, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    assert "must be a folder that exists" in reject("data.tokenizer.type=weights/tokenizer")


def test_validation_data_is_not_looked_for_where_validation_is_off(load: Load, good: str) -> None:
    check(load(good, "data.val_dir=/no/val.jsonl", "trainer.limit_val_batches=0"))


@pytest.mark.parametrize(
    ("size", "rules"),
    [
        (6, ["must divide num_attention_heads (32), but is 6; possible are 1, 2, 4, 8, 16, 32"]),
        (64, ["must divide num_attention_heads (32), but is 64"]),
        (
            3,
            [
                "must divide num_attention_heads (32)",
                "must divide intermediate_size (14336), but is 3",
                "must divide num_key_value_heads (8), or be a multiple of it, but is 3; possible are 1, 2, 4",
            ],
        ),
    ],
)
def test_tensor_parallel_size_must_divide_the_model(reject: Reject, size: int, rules: list[str]) -> None:
    key = "distributed_strategy.tensor_model_parallel_size"
    message = reject(f"{key}={size}", f"trainer.devices={size}")
    assert all(f"{key}: {rule}" in message for rule in rules)


def test_tensor_parallel_size_must_divide_the_vocabulary(reject: Reject, files: Path) -> None:
    shape = {"num_attention_heads": 8, "hidden_size": 64, "vocab_size": 3002}
    (files / "config.json").write_text(json.dumps(shape))
    message = reject("distributed_strategy.tensor_model_parallel_size=4", "trainer.devices=4")
    assert "must divide vocab_size (3002), but is 4; possible are 1, 2" in message, "and 8 heads"


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["model.num_layers=2"], f"{PIPELINE}: must not be above the number of layers (2), but is 4"),
        (
            ["model.num_layers=10", f"{VIRTUAL}=3"],
            f"{VIRTUAL}: x pipeline_model_parallel_size (4) must not be above the number of layers (10), but "
            "is 3; it can be 1 to 2",
        ),
        (
            ["model.num_layers=9", "model.pipeline_cuts=[model.layers.1,model.layers.4,model.layers.8]"],
            "model.pipeline_cuts: must name layers below the last (model.layers.8), which ends the last",
        ),
    ],
)
def test_stages_must_not_outnumber_the_layers(
    load: Load, good: str, reject: Reject, overrides: list[str], rule: str
) -> None:
    parallel = (f"{PIPELINE}=4", "trainer.devices=4")
    check(load(good, *parallel))
    check(load(good, *parallel, "model.num_layers=9", f"{VIRTUAL}=2"))
    assert rule in reject(*parallel, *overrides)


def test_config_json_is_found_beside_the_start_weights(load: Load, good: str, files: Path) -> None:
    (files / "weights" / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 8}))
    config = load(good, "model.model_config=null")
    check(config)
    assert model_config_path(config) == files / "weights" / "config.json"
    assert model_config_path(load(good)) == files / "config.json"
    assert model_config_path(load(good, f"model.model_config={files}")) == files / "config.json"
