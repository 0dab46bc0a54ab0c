"""A configuration whose files are all there, and a loader of YAML texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nxdt_align.config.check import load_checked
from nxdt_align.config.load import load_config
from nxdt_align.config.schema import Config

Load = Callable[..., Config]
Reject = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """A YAML file of a text."""

    def write_yaml(text: str) -> Path:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return path

    return write_yaml


@pytest.fixture
def load(write: Callable[[str], Path]) -> Load:
    """``load_config`` of a YAML text and overrides."""
    return lambda text, *overrides: load_config(str(write(text)), overrides)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Folder with what a configuration names: data, a tokenizer, a model of 32 heads, weights."""
    folder = tmp_path / "files"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "weights" / "model.safetensors").write_text("")
    shape = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "num_hidden_layers": 4,
        "intermediate_size": 14336,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.fixture
def good(files: Path) -> str:
    """A minimal YAML without a fault."""
    return f"""
trainer: {{max_steps: 10}}
exp_manager: {{resume_from_checkpoint: {files}/weights}}
data:
    train_dir: {files}/train.jsonl
    tokenizer: {{type: {files}/tokenizer}}
model: {{model_config: {files}/config.json}}
model_alignment_strategy: {{dpo: {{}}}}
"""


@pytest.fixture
def reject(good: str, write: Callable[[str], Path]) -> Reject:
    """The message with which ``good`` is refused once the overrides are applied."""

    def message(*overrides: str, text: str = good) -> str:
        with pytest.raises(ValueError) as error:
            load_checked(str(write(text)), overrides)
        return str(error.value)

    return message
