"""``nxdt-align reference``: values computed ahead of training, looked at, merged and verified."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from training_fixture import ORPO, Project, write_labelled

from nxdt_align.cli import main
from nxdt_align.reference.parts import digest_of


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Of more records than a share takes at a time, 256."""
    return Project.create(tmp_path_factory.mktemp("reference_verb"), pairs=300)


def reference(project: Project, action: str, *more: str | Path) -> int:
    of_config = ["--config-path", str(project.root / "conf"), "--config-name", "run"]
    return main(["reference", action, *of_config, *map(str, more)])


def cache_at(folder: Path) -> str:
    return f"data.cache_dir={folder}"


@pytest.fixture(scope="module")
def ahead(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder with all values."""
    folder = tmp_path_factory.mktemp("ahead")
    assert reference(project, "precompute", cache_at(folder), f"exp_manager.exp_dir={folder}/runs") == 0
    return folder


def values_in(cache: Path) -> dict[bytes, tuple[float, ...]]:
    found: dict[bytes, tuple[float, ...]] = {}
    for path in sorted(cache.glob("reference/*/part-*")):
        part = load_file(path)
        for key, value in zip(part["ids"], part["values"], strict=True):
            found.setdefault(key.tobytes(), tuple(value.tolist()))
    return found


def test_training_computes_nothing_more(
    project: Project, ahead: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The values are those that training computes itself, bit for bit; nothing but caches was written."""
    assert sorted(path.name for path in ahead.iterdir()) == ["reference", "tokens"]
    caplog.set_level("INFO", logger="nxdt_align")
    assert project.train(cache_at(ahead), f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=1") == 0
    passes = [message for message in caplog.messages if "reference log-probs of" in message]
    assert [" 0 computed" in message for message in passes] == [True, True]
    assert project.train(cache_at(tmp_path), f"exp_manager.exp_dir={tmp_path}/b", "trainer.max_steps=1") == 0
    assert values_in(tmp_path) == values_in(ahead) and len(values_in(ahead)) == 306


def test_shares_of_two_machines(
    project: Project, ahead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in a cache of its own, merged, are the whole pass, bit for bit."""
    for number in (1, 2):
        cache = cache_at(tmp_path / str(number))
        assert reference(project, "precompute", f"--share={number}/2", cache, "--json") == 0
        done = json.loads(capsys.readouterr().out)
        shares = {split: (each["computed"], each["left"]) for split, each in done["splits"].items()}
        # Groups of 256 records are dealt out in turn: 256 and 44 of 300, 6 and none of 6.
        assert shares == {"train": (256, 44), "val": (6, 0)} if number == 1 else {"train": (44, 256)}
    sources = [tmp_path / "1" / "reference", tmp_path / "2" / "reference"]
    assert main(["reference", "merge", *map(str, sources), str(tmp_path / "all" / "reference")]) == 0
    assert "306 records, 306 added from 2 stores" in capsys.readouterr().out
    assert values_in(tmp_path / "all") == values_in(ahead)
    assert reference(project, "inspect", tmp_path / "all", "--json") == 0
    against = json.loads(capsys.readouterr().out)["against"]
    assert against["is_there"] and {each["missing"] for each in against["splits"].values()} == {0}


def test_inspect(project: Project, ahead: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reference", "inspect", str(ahead)]) == 0
    said = capsys.readouterr().out
    assert "306 records of 2 values" in said and "  weights: " in said and "tables of 2 data sets" in said
    assert "the configuration" not in said
    assert reference(project, "inspect", ahead) == 0
    said = capsys.readouterr().out
    assert "train: complete (300 records)" in said and "val: complete (6 records)" in said
    length = "model_alignment_strategy.dpo.max_prompt_length=5"
    assert reference(project, "inspect", ahead, length) == 0
    said = capsys.readouterr().out
    assert f"which is not in {ahead}; it is made from\n  weights: " in said
    assert "train: 300 of 300 records have no value" in said


def test_values_of_the_other_engine(
    project: Project, ahead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found where nothing of NxD is installed, and taken over on request, which is noted; no other number
    format is."""
    nxd = "distributed_strategy.engine=nxd"
    assert reference(project, "inspect", ahead, nxd, "--json") == 0
    against = json.loads(capsys.readouterr().out)["against"]
    assert not against["is_there"] and len(against["in_other_precision"]) == 1
    assert reference(project, "inspect", ahead, nxd) == 0
    precision = against["made_from"]["precision"]
    assert f"reference merge --precision '{precision}' takes its values over" in capsys.readouterr().out
    merge = ("reference", "merge", f"{ahead}/reference", f"{tmp_path}/reference", "--precision")
    for _ in range(2):
        assert main([*merge, precision]) == 0
    assert reference(project, "inspect", tmp_path, nxd) == 0
    said = capsys.readouterr().out
    assert "train: complete (300 records)" in said
    assert "taken on trust: values that were computed in Precision(compute=torch.float32, autocast=F" in said
    assert main([*merge, "Precision(compute=torch.bfloat16, masters=True)"]) == 1
    assert "another number format than Precision(compute=torch.bfloat16" in capsys.readouterr().err


def tampered(cache: Path, by: float) -> None:
    """Whole files of values that are off by so much."""
    for part in cache.glob("reference/*/part-*"):
        arrays = load_file(part)
        values = arrays["values"] + np.float32(by)
        save_file({**arrays, "values": values}, part, {"digest": digest_of(arrays["ids"], values)})
        shutil.rmtree(part.parent / "tables", ignore_errors=True)


def test_verify(project: Project, ahead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reference(project, "verify", cache_at(ahead)) == 0
    said = capsys.readouterr().out
    assert "they agree to 0 nats per token (tolerance 0.0001)" in said
    assert "0 of 300 records have no value" in said
    shutil.copytree(ahead, tmp_path / "tables")
    for part in (tmp_path / "tables").glob("reference/*/part-*"):
        part.unlink()
    assert reference(project, "verify", cache_at(tmp_path / "tables")) == 0
    assert "they agree to 0 nats per token" in capsys.readouterr().out
    shutil.copytree(ahead, tmp_path / "other")
    tampered(tmp_path / "other", 1.0)
    assert reference(project, "verify", cache_at(tmp_path / "other"), "--records=9", "--json") == 1
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    train = found["splits"]["train"]
    assert not found["agree"] and 9 <= train["compared"] < 40
    assert train["worst"] > 0.1 and len(train["worst_record"]) == 32
    (part,) = (p for p in (tmp_path / "other").glob("reference/*/part-*") if len(load_file(p)["ids"]) == 6)
    part.unlink()
    assert reference(project, "verify", cache_at(tmp_path / "other")) == 1
    said = capsys.readouterr().out
    assert "val: 0 compared, 6 of 6 records have no value" in said
    assert "holds values of other weights or other data: remove it" in said


def test_kto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its values are a completion's and a mismatched one's."""
    (tmp_path / "kto").mkdir()
    other = Project.create(tmp_path / "kto")
    write_labelled(other.root)
    kto = ("~model_alignment_strategy.dpo", "model_alignment_strategy.kto.beta=0.1")
    assert reference(other, "precompute", cache_at(tmp_path), *kto) == 0
    assert "train: 44 records, 44 computed" in capsys.readouterr().out
    assert reference(other, "verify", cache_at(tmp_path), *kto) == 0
    assert reference(other, "inspect", tmp_path, *kto) == 0
    assert "train: complete (44 records)" in capsys.readouterr().out


def test_faults(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_at(tmp_path)

    def said(status: int) -> str:
        assert status == 1
        return capsys.readouterr().err

    assert "needs no reference" in said(reference(project, "precompute", cache, *ORPO))
    each_step = "model_alignment_strategy.dpo.precompute_ref_log_probs=False"
    refused = said(reference(project, "precompute", cache, each_step))
    assert "dpo.precompute_ref_log_probs: is False" in refused
    assert "has no value of these data" in said(reference(project, "verify", cache))
    assert "--records: must be at least 1" in said(reference(project, "verify", cache, "--records=0"))
    assert "nothing does not exist" in said(main(["reference", "inspect", str(tmp_path / "nothing")]))
    assert "overrides need --config-name" in said(main(["reference", "inspect", str(tmp_path), "seed=1"]))
    assert "SOURCE ... DESTINATION" in said(main(["reference", "merge", str(tmp_path)]))
    (tmp_path / "file").write_text("")
    assert "data.cache_dir: must be a folder" in said(
        reference(project, "precompute", cache_at(tmp_path / "file"))
    )
    monkeypatch.setenv("COMPILE", "1")
    assert "COMPILE=1: compiles a training run's graphs" in said(reference(project, "precompute", cache))
    for arguments, words in (
        (["reference", "precompute"], "reference precompute needs --config-name"),
        (["reference", "precompute", "--config-name=x", "--share=3/2"], "must be I/N with I from 1 to N"),
        (["reference"], "required: ACTION"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err


@pytest.mark.full
def test_on_two_processes(project: Project, ahead: Path, tmp_path: Path, repo: Path) -> None:
    """By train.sh: rank 0 writes, and both map the table; values agree to 1e-6 with those of one process."""
    environment = {**os.environ, "NXDT_ALIGN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"CONF_FILE": str(project.root / "conf" / "run.yaml"), "REFERENCE": "1/1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [str(repo / "examples" / "train.sh"), "trainer.devices=2", cache_at(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count(": complete") == 1 and "train: 300 records, 300 computed" in done.stdout
    found, wanted = values_in(tmp_path), values_in(ahead)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6)
