"""A changed byte in any file of a converted checkpoint is found, with the file named."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixture import CONFIG, MakeHF, edit, fresh, run, same_folders
from training_fixture import Project

from nxdt_align.errors import UserError
from nxdt_align.models.presets import read_config_json
from nxdt_align.run.policy import load_policy
from nxdt_align.weights.digests import RECORD
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.nxdt import NxDTFolder

GENERATION = {"eos_token_id": [2, 7], "temperature": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"tp": 4, "kv_multiplier": 2},
    "two stages, fused": {"tp": 2, "pp": 2, "fuse_qkv": True, "vocab": 120},
    "xser": {"tp": 2, "kv_multiplier": 1, "xser": True},
    "native": {"to": "native"},
}
OTHERS = ("checkpoint.json", "trainer.pt")
"""Of our own checkpoint, whose reader compares them; trainer.pt holds no weights."""


@pytest.fixture
def convert(make_hf: MakeHF, tmp_path: Path) -> Callable[..., Path]:
    def make(tied: bool = False, **options: Any) -> Path:
        hf = make_hf(replace(CONFIG, tie_word_embeddings=tied), generation=GENERATION)
        run(hf, tmp_path / "there", **options)
        return tmp_path / "there"

    return make


def flip(file: Path, place: int) -> None:
    """Change one bit."""
    with open(file, "r+b") as opened:
        opened.seek(place)
        (byte,) = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [8, pytest.param(None, marks=pytest.mark.full)])
def test_one_bit_in_any_file(
    kind: str, tied: bool, most: int | None, convert: Callable[..., Path], tmp_path: Path
) -> None:
    there, rng = convert(tied, **KINDS[kind]), random.Random(kind)
    run(there, tmp_path / "back", to="hf")
    same_folders(tmp_path / "hf", tmp_path / "back")
    shutil.rmtree(tmp_path / "back")
    files = sorted(f for f in there.rglob("*") if f.is_file() and f.name not in OTHERS)
    beside = [f for f in files if f.parent == there]
    # Our own checkpoint's tensors have their checksums in the files.
    inside = [f for f in files if f.parent != there and kind != "native"]
    for file in beside + (inside if most is None else rng.sample(inside, min(most, len(inside)))):
        whole = file.read_bytes()
        ends = {0, len(whole) - 1} if most is None else set()
        for place in ends | {rng.randrange(len(whole))}:
            flip(file, place)
            if not says_the_same(file, whole):
                with pytest.raises(UserError, match=re.escape(file.name)):
                    run(there, tmp_path / "back", to="hf")
            file.write_bytes(whole)
    assert not (tmp_path / "back").exists()
    run(there, tmp_path / "back", to="hf")


def says_the_same(file: Path, whole: bytes) -> bool:
    """Where the bit was one of white space in the record."""
    try:
        return file.name == RECORD and bool(json.loads(file.read_bytes()) == json.loads(whole))
    except ValueError:
        return False


def test_what_only_a_wrong_checksum_tells(convert: Callable[..., Path], tmp_path: Path) -> None:
    """One weight is another, and all else as it should be."""
    there = convert(**KINDS["plain"])
    shard = there / "model" / "dp_rank_00_tp_rank_02_pp_rank_00.pt"
    record = (there / RECORD).read_bytes()
    edit(shard, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"][0, 0].mul_(1.001) and None)
    before = NxDTFolder(there, CONFIG).read("model.layers.1.self_attn.o_proj.weight")
    (there / RECORD).write_bytes(record)
    with pytest.raises(WeightsError) as error:
        run(there, tmp_path / "back")
    assert str(error.value) == (
        f"{shard} is damaged: it has changed since it was written, by its checksum in {RECORD}. Copy or "
        "convert the checkpoint again"
    )
    assert before.isfinite().all()


def damage_a_weight(there: Path) -> Path:
    """In the middle of a tensor."""
    folder = NxDTFolder(there, read_config_json(there))
    extent = folder._tensors["model.layers.1.mlp.down_proj.weight"][0][0]
    flip(extent.path, extent.offset + extent.nbytes // 2)
    return extent.path


def test_whatever_reads_shards_compares(
    convert: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = convert(**KINDS["plain"])
    shard = damage_a_weight(there)
    fault = f"{shard} is damaged"
    folder = NxDTFolder(there / "model", CONFIG)  # by its own name, too; no weight is read yet
    with pytest.raises(WeightsError, match=fault):
        folder.fingerprint()
    with pytest.raises(WeightsError, match=fault):
        load_policy(there)
    # What this reader would never read is compared when it is opened.
    monkeypatch.setattr(NxDTFolder, "_pieces", lambda self, name: iter(()))
    with pytest.raises(WeightsError, match=fault):
        NxDTFolder(there, CONFIG)


def test_training_does_not_start_from_damaged_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import nemo.utils.exp_manager  # noqa: F401 (its log handlers keep stderr, which no test may have replaced)

    project = Project.create(tmp_path)
    model = read_config_json(tmp_path / "config.json")
    write_hf_folder(tmp_path / "hf", model, fresh(model))
    run(tmp_path / "hf", tmp_path / "shards", tp=2)
    shard = damage_a_weight(tmp_path / "shards")
    start = f"exp_manager.resume_from_checkpoint={tmp_path}/shards"
    assert project.train("data.val_dir=null", "trainer.max_steps=1", start) == 1
    assert f"error: {shard} is damaged" in capsys.readouterr().err


def test_without_checksums_it_is_read_and_said(
    convert: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As NxD's own shards have none, nor has a record of an earlier version."""
    there = convert(**KINDS["plain"])
    record = json.loads((there / RECORD).read_text())
    run(there, tmp_path / "back")
    assert "cannot be verified" not in caplog.text
    for kept in (None, {key: record[key] for key in ("made_from", "crc32", "layout")}):
        (there / RECORD).unlink()
        if kept is not None:
            (there / RECORD).write_text(json.dumps(kept))
        caplog.clear()
        shutil.rmtree(tmp_path / "back")
        run(there, tmp_path / "back")
        assert f"{there} has no checksums: whether its bytes have changed cannot be verified" in caplog.text
        same_folders(tmp_path / "hf", tmp_path / "back")
        (there / RECORD).touch()


def test_lost_files_are_named(convert: Callable[..., Path], tmp_path: Path) -> None:
    there = convert(**KINDS["plain"])
    for name in ("dp_rank_00_tp_rank_03_pp_rank_00.pt", "dp_rank_00_tp_rank_02_pp_rank_00.pt"):
        (there / "model" / name).unlink()
    fault = (
        r"has lost files that conversion.json names, model/dp_.*tp_rank_02.*, model/dp_.*tp_rank_03.*: copy"
    )
    with pytest.raises(WeightsError, match=fault):
        run(there, tmp_path / "back")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_a_user_changed_is_told_from_damage(
    name: str, convert: Callable[..., Path], tmp_path: Path
) -> None:
    there = convert(**KINDS["xser"])
    text = (there / name).read_text()
    (there / name).write_text(text.replace("}", ', "note": "by hand"}'))
    changed = (
        f"{name} is damaged: .*; if you have changed it yourself, .*remove {RECORD}, and nothing is compared"
    )
    with pytest.raises(WeightsError, match=changed):
        run(there, tmp_path / "back")
    if name == "config.json":
        run(there, tmp_path / "named", config=there / name)
    (there / RECORD).unlink()
    run(there, tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")
