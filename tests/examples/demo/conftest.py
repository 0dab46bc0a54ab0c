"""A tiny Llama with random weights beside the demo's data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from demo.evaluate import Pair, read_pairs
from demo.prepare import Sizes, prepare


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``prepare`` makes, and a random model of one layer in ``model``."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_demo")
    prepare(folder, seed=7, sizes=Sizes(sft=300, train=5, heldout=20))
    settings = json.loads((folder / "model_config.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(**{**settings, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48})
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "model")
    return folder


@pytest.fixture
def pairs(tiny_demo: Path) -> list[Pair]:
    return read_pairs(tiny_demo / "data")
