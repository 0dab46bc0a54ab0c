"""Models of the Hugging Face Hub: only what is needed is fetched, and what is missing is said."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_fixture import COMMIT, Hub, serve
from safetensors.torch import load_file
from training_fixture import Project

import nxdt_align
from nxdt_align.cli import main
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import read_config_json
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.weights.hf_writer import write_hf_folder

MODEL = "someone/tiny"
START = f"exp_manager.resume_from_checkpoint={MODEL}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as on the Hub: with a copy of the weights in a form that is not read, and a README."""
    root = tmp_path_factory.mktemp("model")
    Project.create(root)
    config = read_config_json(root / "config.json")
    torch.manual_seed(0)
    folder = root / "start"
    weights = Decoder(config, DenseAttention()).state_dict()
    write_hf_folder(folder, config, weights, tokenizer_dir=root / "tokenizer")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "README.md").write_text("# a model")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub({MODEL: model})
    monkeypatch.chdir(tmp_path)
    with serve(hub, tmp_path / "hub_cache", monkeypatch):
        yield hub


@pytest.fixture
def data(tmp_path: Path) -> str:
    return f"data.train_dir={Project.create(tmp_path / 'made').root / 'train.jsonl'}"


def run(verb: str, *overrides: str) -> int:
    return main([verb, "--config-name", "dpo", *overrides])


def test_a_whole_run_of_a_model_of_the_hub(hub: Hub, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", START, data) == 0
    assert run("plan", START, data) == 0
    assert set(hub.served) == {"config.json", "generation_config.json", *TOKENIZER}
    said = capsys.readouterr()
    assert "the weights of someone/tiny" in said.err
    assert f"resume_from_checkpoint: {MODEL}" in said.out
    assert run("train", START, data) == 0
    assert set(hub.served) - {"config.json", "generation_config.json", *TOKENIZER} == {"model.safetensors"}
    assert "someone/tiny of the Hugging Face Hub" in capsys.readouterr().err
    (export,) = Path.cwd().glob("nemo_experiments/dpo/*/hf_export")
    assert nxdt_align.load_policy(f"{MODEL}@v1").config == nxdt_align.load_policy(export).config
    # Where the Hub has lost it, the cache is enough, and the run is the same one, which has ended.
    served = len(hub.served)
    hub.models.clear()
    assert run("train", START, data) == 0
    assert len(hub.served) == served


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def test_pickled_weights_only_where_there_are_no_others(hub: Hub, model: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(model, older, ignore=shutil.ignore_patterns("*.safetensors"))
    hub.models["someone/older"] = older
    assert nxdt_align.load_policy("someone/older").config.num_hidden_layers == 2
    assert "pytorch_model.bin" in hub.served


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "someone/tinny",
            "the Hugging Face Hub has no model someone/tinny, or a private one: check its spelling",
        ),
        (
            "someone/locked",
            "someone/locked is no folder here, and may be read only by some: accept its terms",
        ),
        ("someone/tiny@v7", "someone/tiny has no branch, tag or commit v7 on the Hugging Face Hub"),
        ("someone/bare", "someone/bare has no weights that are read here"),
        ("mad/start", "did you mean"),
    ],
)
def test_what_the_hub_has_not(
    name: str, words: str, hub: Hub, data: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path("bare")
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    hub.models["someone/bare"] = bare.absolute()
    hub.gated.add("someone/locked")
    assert run("train", f"exp_manager.resume_from_checkpoint={name}", data) == 1
    said = capsys.readouterr().err
    assert f"error: exp_manager.resume_from_checkpoint: {name}" in said
    assert words in said
    assert not Path("nemo_experiments").exists()


def test_without_a_network(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("train", START, data) == 1
    said = capsys.readouterr().err
    assert "someone/tiny is no folder here, and the Hugging Face Hub cannot be reached" in said
    assert "`hf download someone/tiny --local-dir FOLDER`, and name that folder" in said


def test_a_configuration_that_the_fetched_shape_contradicts(
    hub: Hub, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parallel = ("trainer.devices=3", "distributed_strategy.tensor_model_parallel_size=3")
    assert run("config", START, data, *parallel) == 1
    assert "must divide num_attention_heads (4)" in capsys.readouterr().err


def test_a_commit_is_a_revision(hub: Hub) -> None:
    assert nxdt_align.load_policy(f"{MODEL}@{COMMIT}").config.num_hidden_layers == 2
