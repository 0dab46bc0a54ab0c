"""Conversions end to end: there and back is the identity, the files are NxD's, and all that goes wrong."""

from __future__ import annotations

import json
import os
import random
import sys
import types
import zipfile
from dataclasses import replace
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
    load,
    random_config,
    run,
    same_folders,
)
from matrix import seeds
from torch import Tensor

from nxdt_align.errors import UserError
from nxdt_align.models.partition import Partition, fitting_multipliers, fitting_tp
from nxdt_align.models.presets import TINY, DecoderConfig
from nxdt_align.run.conversion import open_weights
from nxdt_align.weights import convert as convert_module
from nxdt_align.weights.extents import BLOCK, Extent, WeightsError
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.nxdt_files import shard_name
from nxdt_align.weights.nxdt_writer import NxDTWriter
from nxdt_align.weights.tensor_files import read_index

# There and back


@pytest.mark.parametrize("seed", seeds(24, usual=10))
def test_there_and_back_is_the_identity(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    config = random_config(rng)
    tp = rng.choice(fitting_tp(config))
    multiplier = rng.choice(fitting_multipliers(config, tp))
    qkv: dict[str, Any] = rng.choice([{}, {"qkv_linear": True}, {"qkv_linear": True, "fuse_qkv": True}])
    if not qkv and multiplier > 1:
        qkv = {"qkv_linear": True}
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    weights = fresh(config, seed, dtype)
    write_hf_folder(tmp_path / "hf", config, weights, max_shard_bytes=rng.choice([20_000, 10**9]))
    sizes = {"tp": tp, "pp": rng.randint(1, config.num_hidden_layers), "kv_multiplier": multiplier}
    run(tmp_path / "hf", tmp_path / "nxdt", **sizes, **qkv, xser=rng.random() < 0.5)
    run(tmp_path / "nxdt", tmp_path / "back", max_shard_bytes=20_000)
    same_folders(tmp_path / "hf", tmp_path / "back")
    before, after = ((tmp_path / f / "config.json").read_text() for f in ("hf", "back"))
    assert json.loads(before) == json.loads(after)
    assert open_weights(tmp_path / "nxdt")[0].fingerprint() == HFFolder(tmp_path / "hf").fingerprint()


@pytest.mark.parametrize(
    "other", [{"tp": 2}, {"tp": 1, "pp": 3}, {"tp": 8, "qkv_linear": True, "xser": True}]
)
def test_other_sizes_directly(other: dict[str, Any], make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(CONFIG), tmp_path / "one", **SIZES)
    run(tmp_path / "one", tmp_path / "two", to="nxdt", **other)
    run(tmp_path / "two", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


Held = tuple[int, int, int, str, int]
"""tp, pp, kv multiplier, qkv, rows of the vocabulary."""


def held_in(folder: Path) -> Held:
    source = open_weights(folder)[0]
    assert isinstance(source, NxDTFolder)
    held = source.partition
    return held.tp, held.pp, held.kv_multiplier, held.qkv, held.padded_vocab


@pytest.mark.parametrize(
    ("source", "stated", "held"),
    [
        (SIZES, {"xser": True}, (4, 2, 2, "split", 100)),
        (SIZES | {"vocab": 128, "qkv_linear": True, "fuse_qkv": True}, {}, (4, 2, 2, "fused", 128)),
        (SIZES | {"vocab": 104}, {"tp": 8}, (8, 2, 4, "split", 104)),
        (SIZES | {"vocab": 100}, {"tp": 8, "pp": 1}, (8, 1, 4, "split", 104)),
        (SIZES, {"tp": 1}, (1, 2, 1, "separate", 100)),
        (SIZES, {"tp": 8, "fuse_qkv": True}, (8, 2, 4, "fused", 104)),
        (SIZES | {"tp": 2, "qkv_linear": True}, {}, (2, 2, 2, "split", 100)),
        ({"tp": 2, "qkv_linear": False}, {"pp": 3}, (2, 3, 1, "separate", 100)),
        ({"tp": 2, "qkv_linear": False}, {"tp": 4}, (4, 1, 2, "split", 100)),
        (SIZES, {"tp": 2, "qkv_linear": False}, (2, 2, 1, "separate", 100)),
    ],
)
def test_of_shards_to_shards_what_is_not_stated_stays(
    source: dict[str, Any], stated: dict[str, Any], held: Held, make_hf: MakeHF, tmp_path: Path
) -> None:
    """But for a layer that NxD does not load at the sizes that are stated: GQAQKVColumnParallelLinear is for
    tp = kv heads x multiplier, separate layers for a multiplier of 1."""
    run(make_hf(CONFIG), tmp_path / "one", **source)
    run(tmp_path / "one", tmp_path / "two", to="nxdt", **stated)
    assert held_in(tmp_path / "two") == held
    run(tmp_path / "two", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


def test_cuts_of_ones_own(make_hf: MakeHF, tmp_path: Path) -> None:
    """As model.pipeline_cuts makes them: after layer 1 of 3, where even stages end after layer 0."""
    run(make_hf(CONFIG), tmp_path / "even", **SIZES)
    run(tmp_path / "hf", tmp_path / "cut", tp=4, kv_multiplier=2, pipeline_cuts=(1,))
    moved = "model.layers.1."
    for rank in range(4):
        early, late = (load(tmp_path / "even" / "model" / shard_name(rank, stage)) for stage in range(2))
        expected = early | {n: t for n, t in late.items() if n.startswith(moved)}
        found = load(tmp_path / "cut" / "model" / shard_name(rank, 0))
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        last = load(tmp_path / "cut" / "model" / shard_name(rank, 1))
        assert list(last) == [name for name in late if not name.startswith(moved)]
    run(tmp_path / "cut", tmp_path / "back", pipeline_cuts=(1,))
    same_folders(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize(
    ("stated", "cuts"),
    [
        ({"tp": 2}, (1,)),
        ({"pp": 3}, None),
        ({"pp": 1}, None),
        ({"pipeline_cuts": (0,)}, None),
        ({"pipeline_cuts": (0, 1)}, None),
    ],
)
def test_of_shards_to_shards_cuts_stay_with_their_number(
    stated: dict[str, Any], cuts: tuple[int, ...] | None, make_hf: MakeHF, tmp_path: Path
) -> None:
    run(make_hf(CONFIG), tmp_path / "one", tp=4, kv_multiplier=2, pipeline_cuts=(1,))
    run(tmp_path / "one", tmp_path / "two", to="nxdt", **stated)
    assert NxDTFolder(tmp_path / "two", CONFIG).partition.cuts == cuts
    run(tmp_path / "two", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("seed", seeds(6, usual=2))
def test_any_kind_by_way_of_any_others(seed: int, tmp_path: Path) -> None:
    """Hugging Face -> shards -> other shards -> our own -> shards -> Hugging Face, at random sizes, with a
    vocabulary that is padded otherwise in each, and in one dtype that holds all values of the first."""
    rng = random.Random(seed)
    config = random_config(rng)
    write_hf_folder(tmp_path / "hf", config, fresh(config, seed, torch.bfloat16))

    def sizes() -> dict[str, Any]:
        tp = rng.choice(fitting_tp(config))
        rows = rng.choice([None, tp * (config.vocab_size // tp + rng.randint(1, 9))])
        multiplier = rng.choice(fitting_multipliers(config, tp))
        drawn = {"tp": tp, "pp": rng.randint(1, config.num_hidden_layers), "kv_multiplier": multiplier}
        style = {"qkv_linear": True, "fuse_qkv": rng.random() < 0.5}
        return drawn | style | {"vocab": rows, "xser": rng.random() < 0.5, "to": "nxdt"}

    dtype = rng.choice([None, "fp32"])
    chain = [sizes() | {"dtype": dtype}, sizes(), {"to": "native"}, sizes(), {"to": "hf", "dtype": "bf16"}]
    place = tmp_path / "hf"
    for number, options in enumerate(chain):
        run(place, tmp_path / str(number), **options)
        place = tmp_path / str(number)
    same_folders(tmp_path / "hf", place)


def test_padding_stays_where_the_configuration_asks_for_it(make_hf: MakeHF, tmp_path: Path) -> None:
    """vocab_size set to the padded size, as NxD Training needs it: the same file makes a run here load it."""
    run(make_hf(CONFIG), tmp_path / "out", **SIZES, vocab=112)
    source = NxDTFolder(tmp_path / "out", replace(CONFIG, vocab_size=112))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded = torch.cat((fresh(CONFIG)[name], torch.zeros(13, CONFIG.hidden_size)))
        assert torch.equal(source.read(name), padded)
        assert torch.equal(source.read_slice(name, (slice(90, 112), slice(3, 9))), padded[90:112, 3:9])


def test_a_mistral_whose_window_is_shorter_than_its_context(make_hf: MakeHF, tmp_path: Path) -> None:
    """As Mistral-7B-v0.1's: weights are converted as any others."""
    make_hf(replace(CONFIG, model_type="mistral", sliding_window=64, max_position_embeddings=2048))
    run(tmp_path / "hf", tmp_path / "out", **SIZES)
    run(tmp_path / "out", tmp_path / "native", to="native")
    run(tmp_path / "native", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    assert before == after and after["sliding_window"] == 64


# The files


def expected_shard(
    weights: dict[str, Tensor], config: DecoderConfig, tp: int, mult: int, rank: int
) -> dict[str, Tensor]:
    """A rank's tensors at one stage, written down from the recipe of NxD's converter, head by head."""
    nh, nkv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    per, group = nh // (nkv * mult), nh // nkv
    order = [k * group + rep * per + i for rep in range(mult) for k in range(nkv) for i in range(per)]
    found = {}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}.self_attn.qkv_proj.", f"model.layers.{i}.self_attn.qkv_proj."
        q = weights[ours + "q_proj.weight"].view(nh, d, -1)[order].flatten(0, 1)
        found[theirs + "weight_q"] = q.chunk(tp)[rank]
        for kind in "kv":
            found[theirs + f"weight_{kind}"] = (
                weights[ours + f"{kind}_proj.weight"].repeat(mult, 1).chunk(tp)[rank]
            )
        o = f"model.layers.{i}.self_attn.o_proj.weight"
        found[o] = weights[o].view(-1, nh, d)[:, order].flatten(1).chunk(tp, 1)[rank]
        mlp = f"model.layers.{i}.mlp."
        halves = [weights[mlp + f"gate_up_proj.{x}_proj.weight"].chunk(tp)[rank] for x in ("gate", "up")]
        found[mlp + "gate_up_proj.weight"] = torch.cat(halves)
        found[mlp + "down_proj.weight"] = weights[mlp + "down_proj.weight"].chunk(tp, 1)[rank]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = weights[f"model.layers.{i}.{norm}.weight"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded = torch.nn.functional.pad(weights[name], (0, 0, 0, -len(weights[name]) % tp))
        found[name] = padded.chunk(tp)[rank]
    return found | {"model.norm.weight": weights["model.norm.weight"]}


def test_shards_are_those_of_the_recipe(make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(CONFIG), tmp_path / "out", tp=4, kv_multiplier=2, qkv_linear=True)
    for rank in range(4):
        expected = expected_shard(fresh(CONFIG), CONFIG, 4, 2, rank)
        found = load(tmp_path / "out" / "model" / shard_name(rank, 0))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(tensor.is_contiguous() for tensor in found.values())


def test_folder_is_one_that_nxd_training_resumes_from(make_hf: MakeHF, tmp_path: Path) -> None:
    """NxD takes the parent as folder, the name as tag, and looks for `done` where it is given no tag."""
    run(make_hf(CONFIG), tmp_path / "pretrained_ckpt", **SIZES)
    out = tmp_path / "pretrained_ckpt"
    assert (out / "done").read_text() == (out / "checkpoint").read_text() == "1"
    names = sorted(f.name for f in (out / "model").iterdir())
    assert names == sorted(shard_name(t, p) for t in range(4) for p in range(2))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "pretrained_ckpt"]
    assert "model.embed_tokens.weight" in load(out / "model" / shard_name(0, 0))
    last = load(out / "model" / shard_name(3, 1))
    assert {n.split(".")[2] for n in last if "layers" in n} == {"1", "2"} and "lm_head.weight" in last


class FakeReference:
    """Stands for torch_xla's class."""

    tid: int


def test_xser_files_are_those_that_torch_xla_reads(
    make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_hf(CONFIG), tmp_path / "plain", **SIZES)
    run(tmp_path / "hf", tmp_path / "xser", **SIZES, xser=True)
    name = "torch_xla.utils.serialization"
    for part in ("torch_xla", "torch_xla.utils", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setattr(sys.modules[name], "TensorReference", FakeReference, raising=False)
    FakeReference.__module__, FakeReference.__qualname__ = name, "TensorReference"
    for tp in range(4):
        file = tmp_path / "xser" / "model" / shard_name(tp, 1)
        with torch.serialization.safe_globals([FakeReference]):
            references: dict[str, Any] = torch.load(file, weights_only=True)
        info = torch.load(f"{file}.info.pt", weights_only=True)
        for key, tensor in load(tmp_path / "plain" / "model" / file.name).items():
            tid = references[key].tid
            assert torch.equal(torch.load(f"{file}.tensors/tensor_{tid}.pt", weights_only=True), tensor)
            assert info[tid] == {"dtype": tensor.dtype, "shape": tensor.shape, "expert_model_parallel": False}


def test_references_are_pickled_as_torch_pickles_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by torch.load without restrictions, as NxD does."""
    from nxdt_align.weights.nxdt_writer import write_references

    write_references(tmp_path / "refs.pt", ["a", "b" * 300])
    name = "torch_xla.utils.serialization"
    for part in ("torch_xla", "torch_xla.utils", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setattr(sys.modules[name], "TensorReference", FakeReference, raising=False)
    loaded = torch.load(tmp_path / "refs.pt", weights_only=False)
    assert {key: value.tid for key, value in loaded.items()} == {"a": 0, "b" * 300: 1}
    with zipfile.ZipFile(tmp_path / "refs.pt") as archive:  # the same file at any time of day
        assert {record.date_time for record in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("options", [SIZES, SIZES | {"xser": True}, {"to": "hf"}])
def test_weights_start_at_blocks_of_their_files(
    options: dict[str, Any], make_hf: MakeHF, tmp_path: Path
) -> None:
    """So that they can be written and read past the system's cache: the first of a safetensors file, all
    of a shard's."""
    run(make_hf(CONFIG), tmp_path / "out", **options)
    files = [f for f in (tmp_path / "out").rglob("*.pt") if not f.name.endswith(".info.pt")]
    for file in files:
        held = read_index(file)
        extents = list(held.values()) if isinstance(held, dict) else [held]
        assert all(e.offset % BLOCK == 0 for e in extents if isinstance(e, Extent)), file
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % BLOCK == 0
        files.append(file)
    assert files


def test_dtype_on_request(make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(CONFIG), tmp_path / "half", **SIZES, dtype="bf16")
    run(tmp_path / "half", tmp_path / "back")
    source, weights = HFFolder(tmp_path / "back"), fresh(CONFIG)
    assert all(torch.equal(source.read(n), weights[n].bfloat16()) for n in weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("style", [{"qkv_linear": True}, {"qkv_linear": True, "fuse_qkv": True}])
def test_fused_and_split_hold_the_same(style: dict[str, Any], make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(CONFIG), tmp_path / "out", **SIZES, **style)
    shard = load(tmp_path / "out" / "model" / shard_name(1, 0))
    parts = [
        expected_shard(fresh(CONFIG), CONFIG, 4, 2, 1)[f"model.layers.0.self_attn.qkv_proj.weight_{k}"]
        for k in "qkv"
    ]
    prefix = "model.layers.0.self_attn.qkv_proj.weight_"
    found = shard[prefix + "qkv"] if "fuse_qkv" in style else torch.cat([shard[prefix + k] for k in "qkv"])
    assert torch.equal(found, torch.cat(parts))


def test_tied_embedding_is_the_head_of_the_last_stage(make_hf: MakeHF, tmp_path: Path) -> None:
    tied = replace(CONFIG, tie_word_embeddings=True)
    run(make_hf(tied), tmp_path / "out", tp=2, pp=2)
    first, last = (load(tmp_path / "out" / "model" / shard_name(1, p)) for p in (0, 1))
    assert torch.equal(first["model.embed_tokens.weight"], last["lm_head.weight"])
    run(tmp_path / "out", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


def test_a_head_that_training_has_untied_is_kept(make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(replace(CONFIG, tie_word_embeddings=True)), tmp_path / "out", tp=2)
    edit(
        tmp_path / "out" / "model" / shard_name(0, 0),
        lambda shard: shard | {"lm_head.weight": shard["lm_head.weight"] + 1},
    )
    run(tmp_path / "out", tmp_path / "back")
    assert "lm_head.weight" in HFFolder(tmp_path / "back").names()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False


def test_full_state_in_one_file_and_a_model_folder_are_sources(make_hf: MakeHF, tmp_path: Path) -> None:
    """As NxD Training's users name them: pytorch_model.bin with --config, and the folder `model`."""
    from nxdt_align.weights.names import to_hf

    make_hf(CONFIG)
    torch.save({to_hf(n): t for n, t in fresh(CONFIG).items()}, tmp_path / "pytorch_model.bin")
    run(tmp_path / "pytorch_model.bin", tmp_path / "out", config=tmp_path / "hf" / "config.json", **SIZES)
    run(tmp_path / "out" / "model", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


def test_shards_stored_column_major_are_read(make_hf: MakeHF, tmp_path: Path) -> None:
    """NxD's converter clones a transposed o_proj, which keeps its strides."""
    run(make_hf(CONFIG), tmp_path / "out", **SIZES)
    for file in (tmp_path / "out" / "model").iterdir():
        edit(file, lambda x: {n: t.t().contiguous().t() if "o_proj" in n else t for n, t in x.items()})
    file = tmp_path / "out" / "model" / shard_name(0, 1)
    assert not load(file)["model.layers.2.self_attn.o_proj.weight"].is_contiguous()
    run(tmp_path / "out", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


def test_tokenizer_is_copied_on_request(make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(CONFIG), tmp_path / "out", **SIZES)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    run(tmp_path / "out", tmp_path / "back", tokenizer=tmp_path / "tokenizer")
    assert (tmp_path / "back" / "tokenizer.json").exists()


# Interrupted, and taken up again


class Interrupt(BaseException):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> list[str]:
    """Make the writer raise at its ``count``-th weight; returns the names written so far."""
    written: list[str] = []
    write = NxDTWriter.write

    def failing(self: NxDTWriter, name: str, whole: Tensor) -> None:
        if len(written) == count:
            raise error
        written.append(name)
        write(self, name, whole)

    monkeypatch.setattr(NxDTWriter, "write", failing)
    return written


@pytest.mark.parametrize("xser", [False, True])
@pytest.mark.parametrize("count", [0, 7])
def test_an_interrupted_conversion_goes_on(
    count: int, xser: bool, make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf(CONFIG)
    with monkeypatch.context() as patch:
        interrupt_after(patch, count, Interrupt())
        with pytest.raises(Interrupt):
            run(tmp_path / "hf", tmp_path / "out", **SIZES, workers=1, xser=xser)
    assert not (tmp_path / "out").exists()
    (left,) = (f for f in tmp_path.iterdir() if f.name.startswith("."))
    with pytest.raises(UserError):
        open_weights(left, tmp_path / "hf" / "config.json")
    with monkeypatch.context() as patch:
        again = interrupt_after(patch, 10**6, Interrupt())
        report = run(tmp_path / "hf", tmp_path / "out", **SIZES, resume=True, verify=False, xser=xser)
    assert report.resumed == count and len(again) == report.weights - count and report.verified
    run(tmp_path / "out", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["back", "hf", "out"]


def test_a_journal_that_was_cut_is_taken_up(
    make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a process leaves it that is killed while it writes a line; twice, so that the repair shows."""
    make_hf(CONFIG)
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 3, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "hf", tmp_path / "out", **SIZES, workers=1, resume=True)
        assert "interrupted: call again with --resume" in caplog.text
        (journal,) = tmp_path.glob(".out*/conversion.jsonl")
        os.truncate(journal, journal.stat().st_size - 5)
    assert run(tmp_path / "hf", tmp_path / "out", **SIZES, resume=True).resumed == 4
    run(tmp_path / "out", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")


def test_another_conversion_is_not_taken_up(
    make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf(CONFIG)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, OSError(28, "No space left on device"))
        with pytest.raises(
            WeightsError, match=r"the disk is full.*kept in .*nxdt-partial; call again with --resume"
        ):
            run(tmp_path / "hf", tmp_path / "out", **SIZES)
    with pytest.raises(WeightsError, match="left from another conversion"):
        run(tmp_path / "hf", tmp_path / "out", tp=2, resume=True)
    os.utime(tmp_path / "hf" / "model.safetensors", (1, 1))
    with pytest.raises(WeightsError, match="its source has changed"):
        run(tmp_path / "hf", tmp_path / "out", **SIZES, resume=True)
    run(tmp_path / "hf", tmp_path / "out", **SIZES)
    assert not list(tmp_path.glob(".*"))


def test_two_conversions_to_one_folder_do_not_meet(make_hf: MakeHF, tmp_path: Path) -> None:
    from nxdt_align.weights.staging import Staging

    with Staging(tmp_path / "out", {}), pytest.raises(WeightsError, match="another conversion is writing"):
        run(make_hf(CONFIG), tmp_path / "out", **SIZES)


# Verification


def test_bytes_that_change_on_disk_are_found(
    make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = NxDTWriter.write

    def flipping(self: NxDTWriter, name: str, whole: Tensor) -> None:
        write(self, name, whole + 1 if name == DOWN else whole)

    monkeypatch.setattr(NxDTWriter, "write", flipping)
    with pytest.raises(WeightsError, match=f"read back differs from what was written: {DOWN}"):
        run(make_hf(CONFIG), tmp_path / "out", **SIZES)
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]
    report = run(tmp_path / "hf", tmp_path / "out", **SIZES, verify=False)
    assert not report.verified


def test_weights_under_way_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes: two of 40 at once, and one of 1000 alone."""
    budget = convert_module._Budget(100)
    with budget.take(40), budget.take(40):
        assert budget._left == 20
    with budget.take(1000):
        assert budget._left == 0
    assert budget._left == 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_nans_of_every_dtype(dtype: torch.dtype) -> None:
    values = torch.zeros(1000)
    assert convert_module.count_nans(values.to(dtype)) == 0
    values[::100] = float("nan")
    assert convert_module.count_nans(values.to(dtype)) == 10
    assert convert_module.count_nans(torch.tensor([float("inf"), -float("inf")], dtype=torch.float32)) == 0


def test_partition_of_a_read_checkpoint_is_the_one_it_was_written_with(nxdt: Path) -> None:
    assert NxDTFolder(nxdt, CONFIG).partition == Partition(CONFIG, 4, 2, 2, "split", 100)
    with pytest.raises(WeightsError, match="holds no shards"):
        NxDTFolder(nxdt.parent, TINY)
