"""The configs of conf/: each holds to the schema and its rules, says what it is, and is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nxdt_align.cli import main
from nxdt_align.config.check import find_faults
from nxdt_align.config.load import load_config, presets
from nxdt_align.config.rules import NOTICES
from nxdt_align.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
WITHOUT_MODEL = ("dpo", "kto", "orpo", "sft")
GIVEN = ("exp_manager.resume_from_checkpoint=elsewhere", "data.train_dir=elsewhere.jsonl")
OBJECTIVES = {
    "DPO": ("dpo", {"loss_type": "sigmoid", "kl_beta": 0.01}),
    "DPO_paper": ("dpo", {"loss_type": "sigmoid", "kl_beta": 0.01}),
    "DPO_LoRA": ("dpo", {"loss_type": "sigmoid", "kl_beta": 0.1}),
    "cDPO": ("dpo", {"loss_type": "sigmoid", "label_smoothing": 0.1}),
    "IPO": ("dpo", {"loss_type": "ipo", "kl_beta": 0.1}),
    "RSO": ("dpo", {"loss_type": "hinge", "gamma": 0.05, "kl_beta": 0.5}),
    "CPO": ("cpo", {"beta": 0.1, "nll_scale": 1.0}),
    "SimPO": ("simpo", {"beta": 2.0, "gamma": 1.0}),
    "ORPO": ("orpo", {"beta": 0.1}),
    "ORPO_paper": ("orpo", {"beta": 0.1, "nll_tokens": "prompt_and_response"}),
    "KTO": ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    "SFT": ("sft", {"packing": True, "train_on_prompt": False}),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_without_fault_but_for_files_that_are_elsewhere(name: str) -> None:
    config = load_config(name, GIVEN if name in WITHOUT_MODEL else (), CONF)
    faults = [str(f) for f in find_faults(config, config.world_size, "native") if not f.is_missing_path]
    limits = [f for f in faults if "engine native does not support it yet" in f]
    assert faults == limits, faults


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_preset_has_the_objective_that_it_is_named_after(name: str) -> None:
    config = load_config(f"hf_llama3_8B_{name}_config", (), CONF)
    objective, settings = OBJECTIVES[name]
    strategy = config.model_alignment_strategy
    assert strategy.objective == objective
    assert {key: getattr(strategy.active, key) for key in settings} == settings
    filename = config.exp_manager.checkpoint_callback_params.filename
    assert filename is not None and f"_{name}--" in filename


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_a_preset_without_a_model_lacks_model_and_data_alone(name: str) -> None:
    config = load_config(name, (), CONF)
    assert config.model_alignment_strategy.objective == name
    missing = {fault.path for fault in find_faults(config, config.world_size, "native")}
    assert missing == {"exp_manager.resume_from_checkpoint", "data.train_dir"}


def test_presets_lists_each_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--config-path", str(CONF)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(NAMES)
    assert all(len(line.split()) > 4 for line in lines)
    assert any("SimPO of Llama-3 8B" in line for line in lines)


def test_a_folder_without_configs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there are no configs in {tmp_path}"):
        presets(tmp_path)


def test_no_preset_has_a_setting_without_effect() -> None:
    for name in OBJECTIVES:
        config = load_config(f"hf_llama3_8B_{name}_config", (), CONF)
        assert [notice for rule in NOTICES for notice in rule(config)] == []


def test_a_preset_is_copied_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To a file or into a folder; it loads from there as the preset does."""
    copy = tmp_path / "new" / "mine.yaml"
    assert main(["presets", "cp", "dpo", str(copy)]) == 0
    assert str(copy) in capsys.readouterr().out
    assert copy.read_bytes() == (CONF / "dpo.yaml").read_bytes()
    mine, preset = load_config(str(copy)), load_config("dpo")
    assert (mine.data, mine.model, mine.trainer) == (preset.data, preset.model, preset.trainer)
    assert main(["presets", "cp", "kto.yaml", str(tmp_path)]) == 0
    assert (tmp_path / "kto.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cp", "dpo"], "must be presets cp NAME FILE"),
        (["mv", "dpo", "x.yaml"], "must be presets cp NAME FILE"),
        (["cp", "dpoo", "x.yaml"], "no config 'dpoo': did you mean dpo?"),
        (["cp", "dpo", "x.yml"], "must end in .yaml"),
        (["cp", "dpo", "there.yaml"], "exists already"),
    ],
)
def test_what_cannot_be_copied(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").touch()
    assert main(["presets", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["there.yaml"]
