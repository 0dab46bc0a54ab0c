"""Conversions of what is damaged, does not fit, or has no place: one clear message, and nothing left."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import (
    CONFIG,
    DOWN,
    SIZES,
    MakeHF,
    edit,
    fresh,
    run,
    same_folders,
)
from torch import Tensor

from nxdt_align.errors import UserError
from nxdt_align.models.partition import PartitionError
from nxdt_align.run.conversion import open_weights
from nxdt_align.weights.digests import RECORD
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.nxdt_files import shard_name


def edit_all(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    for shard in (folder / "model").iterdir():
        edit(shard, change)


def first(folder: Path) -> Path:
    return folder / "model" / shard_name(0, 0)


def truncate(folder: Path) -> None:
    os.truncate(first(folder), first(folder).stat().st_size // 2)


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "shard missing",
        lambda f: (f / "model" / shard_name(2, 1)).unlink(),
        "has 7 shards.*Missing: dp_rank_00_tp_rank_02_pp_rank_01.pt",
    ),
    (
        "shards of the highest rank missing",
        lambda f: [(f / "model" / shard_name(3, p)).unlink() for p in (0, 1)],
        "or shards of the highest ranks are missing",
    ),
    (
        "shards of the upper half missing",
        lambda f: [(f / "model" / shard_name(t, p)).unlink() for t in (2, 3) for p in (0, 1)],
        "or shards of the highest ranks are missing",
    ),
    (
        "shards of the last stage missing",
        lambda f: [(f / "model" / shard_name(t, 1)).unlink() for t in range(4)],
        "hold 1 layers, but num_hidden_layers is 3, or shards of the highest ranks are missing",
    ),
    (
        "surplus shard",
        lambda f: shutil.copy(first(f), f / "model" / shard_name(4, 0)),
        "has 9 shards, but tp 5.*surplus",
    ),
    (
        "replica",
        lambda f: shutil.copy(first(f), f / "model" / "dp_rank_01_tp_rank_00_pp_rank_00.pt"),
        "several data-parallel ranks",
    ),
    ("truncated", truncate, "tp_rank_00_pp_rank_00.pt is damaged or not a PyTorch file"),
    ("emptied", lambda f: os.truncate(first(f), 0), "is damaged or not a PyTorch file"),
    (
        "code",
        lambda f: torch.save({"a": os.system}, first(f)),
        "posix.system, which has no place among weights",
    ),
    ("numbers for names", lambda f: torch.save({3: torch.ones(1)}, first(f)), "a dictionary of tensors"),
    ("not tensors", lambda f: torch.save({"a": 3}, first(f)), "must hold a dictionary of tensors"),
    (
        "wrong shape",
        lambda f: edit(first(f), lambda t: t.update({DOWN: t[DOWN][:, :5]})),
        r"down_proj.weight in dp_rank_00_tp_rank_00_pp_rank_00.pt must have shape \[16, 12\], but has "
        r"\[16, 5\]",
    ),
    (
        "wrong dtype",
        lambda f: edit(f / "model" / shard_name(1, 0), lambda t: t.update({DOWN: t[DOWN].half()})),
        "in dp_rank_00_tp_rank_01_pp_rank_00.pt must be torch.float32, but is torch.float16",
    ),
    (
        "tensor missing",
        lambda f: edit(first(f), lambda t: t.pop(DOWN) is None),
        "missing: model.layers.0.mlp.down_proj.weight in dp_rank_00_tp_r",
    ),
    (
        "tensor surplus",
        lambda f: edit(first(f), lambda t: t.update({"x.bias": torch.ones(1)})),
        "surplus: x.bias in dp_rank_00_tp_rank_00",
    ),
    (
        "copies differ",
        lambda f: edit(
            f / "model" / shard_name(2, 0),
            lambda t: t["model.layers.0.self_attn.qkv_proj.weight_k"].add_(1) is None,
        ),
        "rank 2 holds another copy of model.layers.0.self_attn.qkv_proj.k_proj.weight.*may be another model's"
        r" \(num_key_value_heads is 2\).*--first-replica",
    ),
    (
        "norms differ",
        lambda f: edit(f / "model" / shard_name(1, 1), lambda t: t["model.norm.weight"].add_(1) is None),
        "rank 1 holds another copy of model.norm.weight",
    ),
    ("not finished", lambda f: (f / "done").unlink(), "is not finished: it has no `done` file"),
    ("no config", lambda f: (f / "config.json").unlink(), "has no config.json.*--config"),
    (
        "other layers",
        lambda f: change_config(f, num_hidden_layers=4),
        "the shards hold 3 layers, but num_hidden_layers is 4",
    ),
    (
        "other kv heads",
        lambda f: change_config(f, num_key_value_heads=8),
        "hold 16 rows of keys, but the model has 8 kv heads of 4: 32 rows",
    ),
    ("larger vocabulary", lambda f: change_config(f, vocab_size=128), "hold 100 rows of .*vocab_size is 128"),
    (
        "experts",
        lambda f: first(f).rename(f / "model" / "dp_rank_00_ep_rank_00_tp_rank_00_pp_rank_00.pt"),
        "mixture of experts",
    ),
    (
        "no attention",
        lambda f: edit_all(f, lambda t: {"x": torch.ones(1)}),
        "holds no attention weights of a decoder: x",
    ),
]


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(("damage", "fault"), [c[1:] for c in DAMAGE], ids=[c[0] for c in DAMAGE])
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], Any], fault: str, nxdt: Path, tmp_path: Path
) -> None:
    """By what is wrong with it, as shards that NxD has saved have no checksums."""
    (nxdt / RECORD).unlink()
    damage(nxdt)
    with pytest.raises(UserError, match=f"(?s){fault}"):
        run(nxdt, tmp_path / "back")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "nxdt"]


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "hf": ({"to": "hf"}, "*.safetensors"),
    "plain": (SIZES, "model/*.pt"),
    "xser": (SIZES | {"xser": True}, "model/*.pt"),
    "xser tensors": (SIZES | {"xser": True}, "model/*/*.pt"),
    "native": ({"to": "native"}, "tensors/*.distcp"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_file_cut_anywhere_is_refused(kind: str, seed: int, make_hf: MakeHF, tmp_path: Path) -> None:
    options, pattern = KINDS[kind]
    run(make_hf(CONFIG), tmp_path / "out", **options)
    rng = random.Random(seed)
    file = rng.choice(sorted(f for f in (tmp_path / "out").glob(pattern) if not f.name.endswith(".info.pt")))
    os.truncate(file, rng.randrange(file.stat().st_size))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "out"))):
        run(tmp_path / "out", tmp_path / "back", to="hf", config=tmp_path / "hf" / "config.json")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("seed", range(6))
def test_changed_bytes_are_refused_or_carried_but_never_a_crash(
    seed: int, make_hf: MakeHF, tmp_path: Path
) -> None:
    """Bytes of a shard's index, its pickle and its ZIP records: whatever they come to say."""
    run(make_hf(CONFIG), tmp_path / "out", tp=1)
    rng, file = random.Random(seed), first(tmp_path / "out")
    content = file.read_bytes()
    index = [*range(3000), *range(len(content) - 4000, len(content))]
    for _ in range(40):
        changed = bytearray(content)
        for place in rng.choices(index, k=rng.choice([1, 1, 3])):
            changed[place] = rng.randrange(256)
        file.write_bytes(changed)
        with suppress(UserError):
            open_weights(tmp_path / "out")


@pytest.mark.parametrize("lost", ["tensor_3.pt", ""])
def test_a_lost_xser_file_is_named(lost: str, make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(CONFIG), tmp_path / "out", **SIZES, xser=True)
    file = tmp_path / "out" / "model" / (shard_name(0, 0) + ".tensors") / lost
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    (tmp_path / "out" / RECORD).unlink()
    with pytest.raises(WeightsError, match=r"refers to .*tensor_\d+.pt for model.*, which is missing"):
        run(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize("xser", [False, True])
def test_the_first_format_of_nxd_is_refused_with_the_way_out(
    xser: bool, make_hf: MakeHF, tmp_path: Path
) -> None:
    """tp_rank_TT_pp_rank_PP/checkpoint.pt with the weights under "model"; xser: the file itself."""
    run(make_hf(CONFIG), tmp_path / "out", **SIZES, xser=xser)
    config, old, new = tmp_path / "out" / "config.json", tmp_path / "old", tmp_path / "new"
    (new / "model").mkdir(parents=True)
    old.mkdir()
    for file in sorted((tmp_path / "out" / "model").glob("*.pt")):
        name = file.name.removeprefix("dp_rank_00_").removesuffix(".pt")
        if xser and not file.name.endswith(".info.pt"):
            file.rename(old / name)
            file.with_name(f"{file.name}.tensors").rename(old / f"{name}.tensors")
        elif not xser:
            (old / name).mkdir()
            torch.save({"model": torch.load(file, weights_only=True)}, old / name / "checkpoint.pt")
    with pytest.raises(WeightsError, match=r"tp_rank_00_pp_rank_00 is of the first format that NxD"):
        run(old, tmp_path / "back", config=config)
    for entry in old.iterdir():
        name = entry.name.removesuffix(".tensors")
        target = new / "model" / f"dp_rank_00_{name}.pt{entry.name[len(name) :]}"
        (entry if xser else entry / "checkpoint.pt").rename(target)
    run(new, tmp_path / "back", config=config)
    same_folders(tmp_path / "hf", tmp_path / "back")


def test_first_replica_takes_the_first_of_copies_that_differ(nxdt: Path, tmp_path: Path) -> None:
    edit(nxdt / "model" / shard_name(1, 1), lambda t: t["model.norm.weight"].add_(1) is None)
    run(nxdt, tmp_path / "back", first_replica=True)
    same_folders(tmp_path / "hf", tmp_path / "back")


def test_sizes_that_do_not_fit_leave_nothing(make_hf: MakeHF, tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match="sizes that fit this model: 1, 2, 4, 8"):
        run(make_hf(CONFIG), tmp_path / "out", tp=5)
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"tp": 2}, "--tp_size is 2, but it is 4. Shards are missing or surplus"),
        (
            {"pp": 1, "kv_multiplier": 1},
            "--pp_size is 1, but it is 2; --kv_size_multiplier is 1, but it is 2",
        ),
        ({"pipeline_cuts": (1,)}, "--pipeline-cuts is 1, but it is 0. Shards"),
        ({"n_layers": 4}, "--n_layers is 4, but .* has 3"),
        ({"load_xser": True}, "--load_xser is True, but .* holds plain files"),
        ({"qkv_linear": True, "fuse_qkv": True}, "q, k and v are fused, but .* holds them split"),
        ({"vocab": 128}, "--vocab-size pads the vocabulary of shards, but the target is hf"),
        ({"to": "native", "tokenizer": Path("x")}, "--tokenizer is copied .* but the target is native"),
    ],
)
def test_what_the_user_states_of_the_source_is_checked(
    options: dict[str, Any], fault: str, nxdt: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=fault):
        run(nxdt, tmp_path / "back", **options)
    run(nxdt, tmp_path / "back", **SIZES, n_layers=3, load_xser=False, qkv_linear=True)


def test_sizes_without_shards_are_refused(make_hf: MakeHF, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is native, and .* has none; .*, or write shards with --to nxdt"):
        run(make_hf(CONFIG), tmp_path / "out", to="native", tp=4)
    run(tmp_path / "hf", tmp_path / "out", to="native")
    run(tmp_path / "out", tmp_path / "shards", **SIZES)
    assert NxDTFolder(tmp_path / "shards", CONFIG).partition.tp == 4


def test_config_of_another_model_is_refused(make_hf: MakeHF, tmp_path: Path) -> None:
    change_config(make_hf(CONFIG), intermediate_size=96)
    with pytest.raises(
        WeightsError, match=r"mlp.gate_proj.weight must have shape \[96, 16\], but has \[48, 16\]"
    ):
        run(tmp_path / "hf", tmp_path / "out", tp=2)


def test_a_vocabulary_smaller_than_that_of_the_shards_is_refused(nxdt: Path, tmp_path: Path) -> None:
    """Rows that hold tokens are no padding; 99 tokens are padded to 100 rows, the 100th is 0."""
    (nxdt / RECORD).unlink()
    change_config(nxdt, vocab_size=98)
    fault = r"hold 100 rows .* after the model's vocab_size \(98\) are not 0.* set its vocab_size to 100"
    with pytest.raises(WeightsError, match=fault):
        run(nxdt, tmp_path / "back")
    change_config(nxdt, vocab_size=100)
    run(nxdt, tmp_path / "back")
    assert HFFolder(tmp_path / "back").shape("model.embed_tokens.weight") == (100, 16)


def test_padding_of_the_head_may_have_been_trained(nxdt: Path, tmp_path: Path) -> None:
    """Rows that no label names still get gradients, of the softmax."""

    def train(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"][-1] = 0.5

    edit(nxdt / "model" / shard_name(3, 1), train)
    run(nxdt, tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


def test_a_layer_that_does_not_fit_is_named_with_all_others(make_hf: MakeHF, tmp_path: Path) -> None:
    """One line for all layers: a model has up to a hundred."""
    change_config(make_hf(CONFIG), num_key_value_heads=1)
    with pytest.raises(WeightsError) as error:
        run(tmp_path / "hf", tmp_path / "out", tp=2)
    for kind in "kv":
        line = f"model.layers.{{0-2}}.self_attn.{kind}_proj.weight must have shape [4, 16], but has [8, 16]"
        assert line in str(error.value)


def test_an_output_that_is_taken_is_left_alone(make_hf: MakeHF, tmp_path: Path) -> None:
    make_hf(CONFIG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(WeightsError, match="out is not empty: choose another folder"):
        run(tmp_path / "hf", tmp_path / "out", tp=2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="file is a file"):
        run(tmp_path / "hf", tmp_path / "file", tp=2)
    with pytest.raises(WeightsError, match=r"cannot write .*file/out"):
        run(tmp_path / "hf", tmp_path / "file" / "out", tp=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "hf", "out"]
    (tmp_path / "out" / "thesis.tex").unlink()
    run(tmp_path / "hf", tmp_path / "out", tp=2)


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    """float16 ends at 65504; what is infinite already stays so."""
    weights = fresh(CONFIG, 0, torch.bfloat16)
    weights[DOWN][0, :2] = torch.tensor([1e5, float("-inf")])
    write_hf_folder(tmp_path / "hf", CONFIG, weights)
    with pytest.raises(WeightsError, match=r"down_proj.* largest of torch\.float16 \(65504\), such as 99"):
        run(tmp_path / "hf", tmp_path / "out", dtype="fp16")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf"]
    run(tmp_path / "hf", tmp_path / "out", dtype="fp32")
    weights[DOWN][0, 0] = 65504
    write_hf_folder(tmp_path / "fits", CONFIG, weights)
    with pytest.raises(WeightsError, match="65536"):  # bfloat16's nearest
        run(tmp_path / "fits", tmp_path / "half", dtype="fp16")
    weights[DOWN][0, 0] = 65280
    write_hf_folder(tmp_path / "fits", CONFIG, weights, overwrite=True)
    run(tmp_path / "fits", tmp_path / "half", dtype="fp16")


def test_nans_are_counted_and_kept(make_hf: MakeHF, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = fresh(CONFIG)
    weights[DOWN][0, :3] = float("nan")
    weights["model.norm.weight"][0] = float("inf")
    weights["model.norm.weight"][1] = -float("inf")
    write_hf_folder(tmp_path / "hf", CONFIG, weights)
    report = run(tmp_path / "hf", tmp_path / "out", **SIZES)
    assert report.nans == {DOWN: 3}
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"3 NaN entries in {DOWN}"]
    run(tmp_path / "out", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


Usage = namedtuple("Usage", "total used free")


def test_a_disk_too_small_is_found_before_anything_is_written(
    make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf(CONFIG)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(WeightsError, match=r"the output takes 0.1 GB, but .* has 0.0 GB free"):
        run(tmp_path / "hf", tmp_path / "out", **SIZES)
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_keeps_what_is_written_out_of_sight(make_hf: MakeHF, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk."""
    make_hf(CONFIG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(WeightsError, match=r"cannot write .*out"):
            run(tmp_path / "hf", tmp_path / "out", to="hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "hf", tmp_path / "out", to="hf", resume=True)
    same_folders(tmp_path / "hf", tmp_path / "out")
