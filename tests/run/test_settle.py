"""Presets that name no model: one command is a whole run; what it leaves open is chosen, said and kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from training_fixture import Project, write_labelled

from nxdt_align.cli import main
from nxdt_align.config.check import ConfigError
from nxdt_align.config.engines import Engine
from nxdt_align.config.load import load_config, to_yaml
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import LLAMA3_8B, read_config_json
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.run.settle import settle, settle_sizes
from nxdt_align.weights.hf_writer import write_hf_folder

PRESETS = ("dpo", "orpo", "kto", "sft")
LENGTH, PROMPT = "data.seq_length", "model_alignment_strategy.dpo.max_prompt_length"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``start``, a model of 256 positions, and ``train.jsonl``, pairs."""
    root = tmp_path_factory.mktemp("made")
    Project.create(root)
    config = read_config_json(root / "config.json")
    torch.manual_seed(0)
    weights = Decoder(config, DenseAttention()).state_dict()
    write_hf_folder(root / "start", config, weights, tokenizer_dir=root / "tokenizer")
    return root


@pytest.fixture
def given(made: Path) -> tuple[str, str]:
    return (
        f"exp_manager.resume_from_checkpoint={made / 'start'}",
        f"data.train_dir={made / 'train.jsonl'}",
    )


def shaped(made: Path, tmp_path: Path, **values: object) -> str:
    """The override that names a model of another shape."""
    shape = json.loads((made / "config.json").read_text()) | values
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return f"model.model_config={tmp_path}"


def lengths(config: Config) -> tuple[int, int]:
    return config.data.seq_length, config.model_alignment_strategy.max_prompt_length


@pytest.mark.parametrize("name", PRESETS)
def test_one_command_is_a_whole_run(
    name: str,
    given: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config-name", name, *given]) == 0
    said = capsys.readouterr().err
    chosen = (
        "chosen for cpu and this model: data.seq_length 256, "
        f"model_alignment_strategy.{name}.max_prompt_length 192, precision.type fp32"
    )
    assert said.count(chosen) == 1
    assert list(tmp_path.glob(f"nemo_experiments/{name}/*/hf_export/model.safetensors"))
    if name != "dpo":
        return
    # The same command again is the same run, and other lengths make another one.
    again = ("trainer.max_epochs=2", *given)
    assert main(["train", "--config-name", name, *again]) == 0
    assert "resuming from this run's own checkpoint" in capsys.readouterr().err
    assert main(["train", "--config-name", name, *again, "data.seq_length=128"]) == 0
    assert "a new run" in capsys.readouterr().err


def test_kto_takes_labelled_completions(given: tuple[str, str], made: Path, tmp_path: Path) -> None:
    for file in ("train.jsonl", "val.jsonl"):
        (tmp_path / file).write_text((made / file).read_text())
    write_labelled(tmp_path)
    data = (f"data.train_dir={tmp_path / 'train.jsonl'}", f"exp_manager.exp_dir={tmp_path / 'experiments'}")
    assert main(["train", "--config-name", "kto", given[0], *data]) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_without_a_model_says_what_to_add(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("config", "plan", "train"):
        assert main([verb, "--config-name", name]) == 1
        said = capsys.readouterr().err
        assert "2 faults in" in said
        assert "data.train_dir: is required" in said
        assert "exp_manager.resume_from_checkpoint: is required: a model's folder, or its name on the" in said


def test_lengths_are_what_the_model_was_made_for(given: tuple[str, str], made: Path, tmp_path: Path) -> None:
    """At most 4,096; the window where no layer sees more; three quarters for the prompt."""
    mistral = {"model_type": "mistral", "max_position_embeddings": 32768}
    for values, expected in (
        ({}, 256),
        ({"max_position_embeddings": 131072}, 4096),
        ({**mistral, "sliding_window": 1024}, 1024),
        ({**mistral, "sliding_window": None}, 4096),
    ):
        config = load_config("dpo", (*given, shaped(made, tmp_path, **values)))
        assert lengths(settle(config, "native").config) == (expected, expected * 3 // 4)
    wide = shaped(made, tmp_path, max_position_embeddings=131072)
    config = load_config("dpo", (*given, wide, "model.encoder_seq_length=8192"))
    assert lengths(settle(config, "native").config) == (8192, 6144)


def test_a_given_length_is_kept(given: tuple[str, str]) -> None:
    config = load_config("dpo", (*given, "data.seq_length=100"))
    assert config.auto == {"precision.type", PROMPT}
    assert lengths(settle(config, "native").config) == (100, 50)
    with pytest.raises(ConfigError, match=r"max_prompt_length: must be below data.seq_length \(256\)"):
        settle(load_config("dpo", (*given, f"{PROMPT}=300")), "native")


@pytest.mark.parametrize(
    ("device", "expected"), [("neuron", "mixed_precision"), ("cuda", "mixed_precision"), ("cpu", "fp32")]
)
def test_precision_follows_the_device(device: str, expected: str, given: tuple[str, str]) -> None:
    settled = settle(load_config("dpo", given), "native", device=device)
    assert settled.config.precision.type == expected
    assert settled.config.auto == frozenset()
    assert settle(settled.config, "native", device=device).notes == ()


def test_an_older_gpu_computes_in_fp16(given: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert settle(load_config("dpo", given), "native", device="cuda").config.precision.type == "fp16"


def test_a_configuration_without_auto_stays_as_it_is(given: tuple[str, str]) -> None:
    config = load_config("dpo", (*given, "precision.type=fp32", f"{LENGTH}=64", f"{PROMPT}=32"))
    assert config.auto == frozenset()
    assert settle(config, "native").config == config


def test_auto_is_written_as_auto(given: tuple[str, str], tmp_path: Path) -> None:
    config = load_config("dpo", given)
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    again = load_config(str(tmp_path / "written.yaml"))
    assert again == config and again.auto == config.auto == {LENGTH, PROMPT, "precision.type"}


def test_auto_is_no_value_of_other_keys() -> None:
    with pytest.raises(ConfigError, match=r"data\.micro_batch_size: must be an integer, but is 'auto'"):
        load_config("dpo", ("data.micro_batch_size=auto",))


def test_a_folder_that_lacks_something(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for lacking, words in (
        ("config.json", "model.model_config: is required, since"),
        ("tokenizer.json", "data.tokenizer.type: is required: the folder of a Hugging Face tokenizer, as"),
        ("model.safetensors", "has no weights: it must hold one of model.safetensors"),
    ):
        folder = tmp_path / f"without_{lacking}"
        folder.mkdir()
        for file in (made / "start").iterdir():
            if file.name != lacking:
                (folder / file.name).symlink_to(file)
        start = f"exp_manager.resume_from_checkpoint={folder.name}"
        assert main(["train", "--config-name", "dpo", start, f"data.train_dir={made / 'train.jsonl'}"]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "nemo_experiments").exists()


def test_a_tokenizer_of_a_larger_vocabulary(given: tuple[str, str], made: Path, tmp_path: Path) -> None:
    from nxdt_align.run.contracts import RunEnv
    from nxdt_align.run.mode import RunMode
    from nxdt_align.run.ready import require_ready

    config = load_config("dpo", (*given, shaped(made, tmp_path, vocab_size=64)))
    config = dataclasses.replace(
        config, exp_manager=dataclasses.replace(config.exp_manager, resume_from_checkpoint=None)
    )
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, tokenizer=dataclasses.replace(config.data.tokenizer, type=str(made / "tokenizer"))
        ),
    )
    with pytest.raises(UserError, match="tokens, but the model's vocab_size is 64"):
        require_ready(settle(config, "native").config, "native", RunEnv(), RunMode())


@pytest.mark.parametrize("engine", ["nxd", "native"])
def test_sizes_of_a_known_model_need_no_download(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the published YAML with two overrides; its own number of layers stays."""

    def refuse(*_: object, **__: object) -> Path:
        raise UserError("asked the Hub")

    monkeypatch.setattr("nxdt_align.run.settle.fetch_model", refuse)
    hub = "exp_manager.resume_from_checkpoint=meta-llama/Meta-Llama-3-8B"
    config = load_config("hf_llama3_8B_DPO_config", ["model.model_config=null", "model.num_layers=3", hub])
    _, model = settle_sizes(config, engine, device="neuron", reads_data=False)
    assert model == dataclasses.replace(LLAMA3_8B, num_hidden_layers=3)
    with pytest.raises(UserError, match="asked the Hub"):
        settle_sizes(config, engine, device="neuron", reads_data=True)
