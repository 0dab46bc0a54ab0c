"""Values that are of the right type and still cannot be meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nxdt_align.config.check import check_notices, find_faults
from nxdt_align.config.data import FORMATS as NAMES
from nxdt_align.config.schema import Config
from nxdt_align.data.formats import FORMATS

Load = Callable[..., Config]
Reject = Callable[..., str]
CALLBACK = "exp_manager.checkpoint_callback_params"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            f"{CALLBACK}.train_time_interval=30",
            "train_time_interval: must be a time, but is 30; give days, hours",
        ),
        (f"{CALLBACK}.train_time_interval={{min: 30}}", "train_time_interval: must be a time"),
        (f"{CALLBACK}.mode=adamw", f"{CALLBACK}.mode: must be one of max, min, but is 'adamw'"),
        ("precision.xla_use_bf16=yes", "precision.xla_use_bf16: must be one of 0, 1, but is 'yes'"),
        ("distributed_strategy.kv_replicator=1e308", "kv_replicator: must be an integer below 2^63"),
        ("distributed_strategy.kv_replicator=1000", "kv_replicator: must be at most 128, but is 1000"),
        ("trainer.devices=1e30", "trainer.devices: must be an integer below 2^63"),
        ("trainer.max_steps=${multiply:}", "trainer.max_steps: cannot be resolved: "),
        ("trainer.max_steps=${multiply:}", "multiply takes numbers, as ${multiply:8, 4}, but got []"),
        ("trainer.max_steps=${multiply:3,null}", "multiply takes numbers, as ${multiply:8, 4}"),
        ("trainer.max_steps=${multiply:1e308,10}", "trainer.max_steps: must be a finite number"),
        ("data.format=3.7", "data.format: must be a format of the objective's examples, but is '3.7'"),
        ("data.format=pair", "but is 'pair'; did you mean pairs? There are: pairs, fairseq2, "),
        (
            "data.format=messages",
            "There are: pairs, fairseq2, responses, sharegpt, orca, hh, alpaca, openai, torchtune, swift, ",
        ),
        ("name=..", "name: must be the name of one folder or file, without / and not . or .., but is '..'"),
        ("name=../..", "name: must be the name of one folder or file"),
        ("exp_manager.name=a/b", "exp_manager.name: must be the name of one folder or file"),
        (f"{CALLBACK}.filename=../{{step}}", f"{CALLBACK}.filename: must be the name of one folder or file"),
        (f"{CALLBACK}.prefix=elsewhere/x", f"{CALLBACK}.prefix: must be the name of one folder or file"),
        ("name=", "name: must not be empty, but is ''; leave it out, or name the run"),
        ("exp_manager.name=' '", "exp_manager.name: must not be empty"),
        (
            "exp_manager.explicit_log_dir=",
            "exp_manager.explicit_log_dir: must not be empty, but is ''; leave it",
        ),
        ("name=" + "n" * 50_000, "name: must have at most 150 bytes, but has 50000; shorten it"),
        ("name=" + "é" * 100, "name: must have at most 150 bytes, but has 200"),
        ("exp_manager.exp_dir=/" + "x" * 300, "exp_manager.exp_dir: must be a path of at most 4095 bytes"),
        ("data.train_dir=" + "x/" * 3000, "data.train_dir: must be a path of at most 4095 bytes"),
    ],
)
def test_a_value_that_cannot_be_meant(reject: Reject, override: str, message: str) -> None:
    shown = reject(override)
    assert message in shown
    assert len(shown) < 1000


@pytest.mark.parametrize("name", ["run-1", "über lauf", "..dotted", "3.7", "x" * 150])
def test_names_that_a_folder_can_have(load: Load, good: str, name: str) -> None:
    assert find_faults(load(good, f"exp_manager.name={name}", f"name={name}")) == []


def test_a_checkpoints_name_may_have_a_metric_with_a_slash(load: Load, good: str) -> None:
    assert find_faults(load(good, f"{CALLBACK}.filename='{{step}}-{{val/loss}}'")) == []


def test_a_switch_may_be_written_as_a_number(load: Load) -> None:
    assert load("precision: {type: manual, xla_use_bf16: 1}").precision.xla_use_bf16 == "1"


def test_the_names_of_formats_are_those_of_the_formats() -> None:
    assert {kind: set(names) for kind, names in NAMES.items()} == {
        kind: {each.name for each in formats} for kind, formats in FORMATS.items()
    }


def test_sequences_beyond_the_models_positions_are_told(load: Load, good: str, files: Path) -> None:
    assert check_notices(load(good)) == []
    file = files / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 2048}))
    (notice,) = check_notices(load(good))
    assert notice.startswith(
        "data.seq_length is 4096, above the model's max_position_embeddings (2048)"
    ) and notice.endswith("set data.seq_length=2048")
    assert check_notices(load(good, "data.seq_length=2048")) == []
    assert check_notices(load(good, "model.max_position_embeddings=4096")) == []
