"""The verbs convert, export and inspect, and training from what they write."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_fixture import fresh
from training_fixture import Project, scalars

from nxdt_align.cli import main
from nxdt_align.engines.native.checkpoint import NativeCheckpoint
from nxdt_align.engines.nxd.checkpoint import SUMMARY as NXD_SUMMARY
from nxdt_align.models.presets import LLAMA3_8B, TINY, read_config_json
from nxdt_align.run.conversion import describe, open_weights
from nxdt_align.run.resume import write_identity
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.nxdt import NxDTFolder


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", TINY, fresh(TINY))
    return tmp_path / "hf"


def test_nxd_trainings_command_line_works_as_it_is(hf: Path, repo: Path, tmp_path: Path) -> None:
    script, out = repo / "scripts" / "convert_ckpt.py", tmp_path / "pretrained_ckpt"
    common = ["--model_style", "hf", "--tp_size", "4", "--pp_size", "2", "--kv_size_multiplier", "2"]
    common += ["--qkv_linear", "True", "--n_layers", "2", "--config", str(hf / "config.json")]
    there = [*common, "--hw_backend", "trn1", "--save_xser", "True", "--convert_from_full_state"]
    command = [sys.executable, str(script), *there, "--input_dir", str(hf), "--output_dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensor parallel 4, pipeline parallel 2, kv multiplier 2, q, k and v split, xser" in done.stderr
    back = [*common, "--load_xser", "True", "--convert_to_full_state"]
    assert main(["convert", *back, "--input_dir", f"{out}/model", "--output_dir", f"{tmp_path}/back"]) == 0
    assert HFFolder(tmp_path / "back").fingerprint() == HFFolder(hf).fingerprint()


def test_qkv_linear_false_is_false(hf: Path, tmp_path: Path) -> None:
    """NxD's converter takes any text for True."""
    flags = ["--tp", "2", "--qkv_linear", "False", "--fuse_qkv", "False"]
    assert main(["convert", str(hf), str(tmp_path / "out"), *flags]) == 0
    assert NxDTFolder(tmp_path / "out", TINY).partition.qkv == "separate"


def test_xser_there_and_back_under_nxds_names(hf: Path, tmp_path: Path) -> None:
    plain, xser, again = (str(tmp_path / name) for name in ("plain", "xser", "again"))
    assert main(["convert", str(hf), plain, "--tp", "2"]) == 0
    assert main(["convert", plain, xser, "--tp", "2", "--convert_to_xser"]) == 0
    assert NxDTFolder(xser, TINY).is_xser
    assert main(["convert", xser, again, "--tp", "2", "--convert_from_xser"]) == 0
    assert not NxDTFolder(again, TINY).is_xser
    assert NxDTFolder(again, TINY).fingerprint() == HFFolder(hf).fingerprint()


def test_a_direction_that_is_not_the_sources_is_refused(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, xser, out = (str(tmp_path / name) for name in ("plain", "xser", "out"))
    assert main(["convert", str(hf), plain, "--tp", "2", "--convert_from_full_state"]) == 0
    assert main(["convert", plain, xser, "--convert_to_xser"]) == 0
    for source, flag, wanted in (
        (plain, "from_full_state", "whole weights"),
        (plain, "from_xser", "xser shards"),
        (xser, "to_xser", "plain shards"),
    ):
        capsys.readouterr()
        assert main(["convert", source, out, f"--convert_{flag}"]) == 1
        assert f"--convert_{flag} is for {wanted}, but the NxD checkpoint" in capsys.readouterr().err
    assert not Path(out).exists()


def test_one_file_of_weights_needs_a_configuration(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hf / "config.json").rename(tmp_path / "config.json")
    command = ["convert", f"{hf}/model.safetensors", f"{tmp_path}/out"]
    assert main(command) == 1
    assert "has no config.json: give the model's with --config" in capsys.readouterr().err
    assert main([*command, "--config", f"{tmp_path}/config.json"]) == 0


def test_xser_flags_keep_the_sizes(hf: Path, tmp_path: Path) -> None:
    """NxD's converter rewrites the shards that are there."""
    assert main(["convert", str(hf), f"{tmp_path}/plain", "--tp", "4", "--pp", "2", "--fuse_qkv"]) == 0
    assert main(["convert", f"{tmp_path}/plain", f"{tmp_path}/xser", "--convert_to_xser"]) == 0
    plain, xser = (NxDTFolder(tmp_path / name, TINY) for name in ("plain", "xser"))
    assert xser.is_xser and xser.partition == plain.partition
    assert (xser.partition.tp, xser.partition.pp, xser.partition.qkv) == (4, 2, "fused")


@pytest.mark.parametrize("cuts", ["1", "model.layers.1", '["model.layers.1"]'])
def test_pipeline_cuts_are_taken_as_the_yaml_has_them(cuts: str, tmp_path: Path) -> None:
    config = replace(TINY, num_hidden_layers=3)
    write_hf_folder(tmp_path / "hf", config, fresh(config))
    assert main(["convert", f"{tmp_path}/hf", f"{tmp_path}/out", "--tp", "2", "--pipeline-cuts", cuts]) == 0
    partition = NxDTFolder(tmp_path / "out", config).partition
    assert (partition.pp, partition.cuts) == (2, (1,))


def documented(page: Path) -> list[list[str]]:
    """The conversion commands in a page's bash blocks, in order, without their comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    joined = [block.replace("\\\n", " ") for block in blocks]
    lines = [shlex.split(line, comments=True) for block in joined for line in block.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["nxdt-align"] and line[1] in VERBS]


VERBS = ("convert", "export", "inspect")


def test_the_commands_of_readme_run_one_after_the_other(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are written, on a small model with as many heads as the one that they name. Those of
    docs/conversion.md: tests/docs/test_pages.py."""
    monkeypatch.chdir(tmp_path)
    small = {"hidden_size": 64, "head_dim": 2, "intermediate_size": 64, "vocab_size": 96}
    config = replace(LLAMA3_8B, num_hidden_layers=4, **small)
    write_hf_folder("Meta-Llama-3-8B", config, fresh(config))
    (tmp_path / "Meta-Llama-3-8B" / "tokenizer.json").write_text("{}")
    for checkpoint in ("CHECKPOINT", "nemo_experiments/hf_llama/DATE/checkpoints/NAME"):
        assert main(["convert", "Meta-Llama-3-8B", checkpoint, "--to", "native"]) == 0
    commands = documented(repo / "README.md")
    assert len(commands) == 4
    for command in commands:
        assert main(command) == 0, command
    made = [command[2] for command in commands if command[0] != "inspect"]
    prints = {source.fingerprint() for source, _ in (open_weights(Path(place)) for place in made)}
    assert prints == {HFFolder("Meta-Llama-3-8B").fingerprint()}


def test_inspect_says_what_it_is(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(hf), str(tmp_path / "out"), "--tp", "4", "--dtype", "bf16"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(t.numel() for t in fresh(TINY).values())
    assert found["dtypes"] == {"bfloat16": 21} and found["shards"]["kv multiplier"] == 2
    assert main(["inspect", str(hf)]) == 0
    text = capsys.readouterr().out
    assert "layout: Hugging Face" in text and "  model.layers.{0-1}.mlp.down_proj.weight" in text


def test_who_reads_what_is_printed_may_leave(hf: Path) -> None:
    """As `nxdt-align inspect PATH | head -1` does."""
    readable, writable = os.pipe()
    os.close(readable)
    command = [sys.executable, "-m", "nxdt_align", "inspect", str(hf)]
    done = subprocess.run(command, stdout=writable, stderr=subprocess.PIPE, text=True)
    os.close(writable)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["SRC"], "convert needs a source and a destination"),
        (["SRC", "DST", "--convert_to_full_state", "--convert_to_xser"], "give one direction"),
        (["SRC", "DST", "--convert_to_full_state"], "is for plain shards or xser shards, but the"),
        (["SRC", "DST", "--convert_to_xser"], "--convert_to_xser is for plain shards, but the"),
        (["above", "DST"], "a run's checkpoint. Did you mean"),
        (["SRC", "DST", "--hw_backend", "trn2"], "--hw_backend: must be trn1"),
        (["SRC", "DST", "--virtual_pp_size", "2"], "--virtual_pp_size: must be 1"),
        (["missing", "DST"], "missing does not exist: give a folder of weights"),
        (["SRC", "DST", "--pipeline-cuts", "1"], "must be 1 layers below the last (1) in ascending order"),
        (["SRC", "DST", "--pp", "2", "--pipeline-cuts", "0,1"], "must be 1 layers below the last (1)"),
        (["SRC", "DST", "--tp", "8"], "tensor-parallel size of 8 does not fit 4 query heads and 2 kv heads"),
    ],
)
def test_bad_arguments(
    arguments: list[str], fault: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"SRC": str(hf), "DST": str(tmp_path / "out"), "missing": str(tmp_path / "missing")}
    places["above"] = str(tmp_path)
    assert main(["convert", *[places.get(text, text) for text in arguments]]) == 1
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flag",
    [
        ["--tp", "0"],
        ["--qkv_linear", "maybe"],
        ["--model_style", "megatron"],
        ["--pipeline-cuts", "ten"],
        ["--pipeline-cuts", "1,"],
    ],
)
def test_bad_values_of_an_option(flag: list[str], hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(hf), "out", *flag])
    assert flag[0] in capsys.readouterr().err


def test_conversion_loads_no_training_library() -> None:
    heavy = ("lightning", "nemo", "transformers")
    code = f"import sys, nxdt_align.run.conversion; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def test_our_own_checkpoint_there_and_back(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["convert", str(hf), str(native), "--to", "native"]) == 0
    assert main(["export", str(native), str(back)]) == 0
    assert HFFolder(back).fingerprint() == HFFolder(hf).fingerprint()
    assert main(["inspect", str(native)]) == 0
    assert "layout: nxdt-align's native engine" in capsys.readouterr().out
    assert main(["convert", str(hf), str(native), "--to", "native"]) == 1
    assert "native is not empty: choose another folder" in capsys.readouterr().err
    (native / "config.json").unlink()
    assert main(["export", str(native), str(tmp_path / "again")]) == 1
    assert "give its config.json with --config" in capsys.readouterr().err


# Training


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with start weights in Hugging Face's layout and in NxD's."""
    project = Project.create(tmp_path_factory.mktemp("project"), pairs=8)
    config = read_config_json(project.root / "config.json")
    write_hf_folder(project.root / "hf", config, fresh(config))
    assert (
        main(["convert", str(project.root / "hf"), str(project.root / "pretrained_ckpt"), "--tp", "4"]) == 0
    )
    return project


def train(project: Project, start: str, experiments: str) -> Path:
    overrides = [f"exp_manager.resume_from_checkpoint={project.root}/{start}", "trainer.max_steps=2"]
    assert project.train(*overrides, f"exp_manager.exp_dir={project.root}/{experiments}") == 0
    return project.only_run(experiments)


def test_training_starts_from_shards_as_from_the_folder_they_are_of(project: Project) -> None:
    runs = [train(project, start, f"from_{start}") for start in ("hf", "pretrained_ckpt")]
    losses = [scalars(run)["reduced_train_loss"] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    identities = [json.loads((run / "run_identity.json").read_text())["identity"] for run in runs]
    assert identities[0] == identities[1]


def test_a_runs_checkpoint_is_exported_without_its_configuration(project: Project, tmp_path: Path) -> None:
    run = train(project, "hf", "exported")
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert (
        main(
            ["export", str(checkpoint), str(tmp_path / "out"), "--tokenizer", str(project.root / "tokenizer")]
        )
        == 0
    )
    native, exported = NativeCheckpoint(checkpoint), HFFolder(tmp_path / "out")
    assert all(torch.equal(exported.read(n), native.read(n)) for n in native.names())
    assert exported.fingerprint() == HFFolder(run / "hf_export").fingerprint()
    assert main(["convert", str(checkpoint), str(tmp_path / "nxdt"), "--to", "nxdt", "--tp", "2"]) == 0
    assert (
        NxDTFolder(tmp_path / "nxdt", read_config_json(tmp_path / "out")).fingerprint()
        == exported.fingerprint()
    )


def test_a_checkpoint_of_engine_nxd_is_exported_without_its_configuration(hf: Path, tmp_path: Path) -> None:
    """Shards and the engine's summary; the shape is in the run's folder."""
    run, config = tmp_path / "run", read_config_json(hf)
    checkpoint = run / "checkpoints" / "step=2"
    assert main(["convert", str(hf), str(checkpoint), "--tp", "2"]) == 0
    for name in ("config.json", "conversion.json"):
        (checkpoint / name).unlink()
    NXD_SUMMARY.write(checkpoint, {"step": 2})
    write_identity(run, "identity", {"model": config.to_hf_dict()})
    assert describe(checkpoint)["model"]["query heads"] == config.num_attention_heads
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    assert HFFolder(tmp_path / "out").fingerprint() == HFFolder(hf).fingerprint()


def test_shards_of_another_model_and_metas_download_are_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf_folder(tmp_path / "other", TINY, fresh(TINY))
    assert main(["convert", str(tmp_path / "other"), str(tmp_path / "shards"), "--tp", "2"]) == 0
    assert project.train(f"exp_manager.resume_from_checkpoint={tmp_path}/shards") == 1
    assert "exp_manager.resume_from_checkpoint: " in capsys.readouterr().err
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    assert project.train(f"exp_manager.resume_from_checkpoint={tmp_path}/meta") == 1
    assert "is Meta's original download; nxdt-align convert" in capsys.readouterr().err
