"""What ``nxdt-align inspect`` says of each kind of checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import CONFIG, DOWN, SIZES, MakeHF, edit, fresh, run
from meta_fixture import CONFIG as METAS
from meta_fixture import write_meta

from nxdt_align.models.presets import DecoderConfig, weight_shapes
from nxdt_align.run.conversion import describe
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.inspect import to_text
from nxdt_align.weights.names import to_hf
from nxdt_align.weights.nxdt_files import shard_name

Make = Callable[[MakeHF, Path], Path]


def as_hf(make_hf: MakeHF, folder: Path) -> Path:
    return make_hf(CONFIG, torch.bfloat16, max_shard_bytes=10_000)


def as_bin(make_hf: MakeHF, folder: Path) -> Path:
    (make_hf(CONFIG, torch.bfloat16) / "model.safetensors").unlink()
    tensors = {to_hf(name): tensor for name, tensor in fresh(CONFIG, 0, torch.bfloat16).items()}
    torch.save(tensors, folder / "hf" / "pytorch_model.bin")
    return folder / "hf" / "pytorch_model.bin"


def written(**options: Any) -> Make:
    def make(make_hf: MakeHF, folder: Path) -> Path:
        run(make_hf(CONFIG, torch.bfloat16), folder / "out", **options)
        return folder / "out"

    return make


def as_meta(make_hf: MakeHF, folder: Path) -> Path:
    write_meta(folder / "meta", METAS, 2, 0)
    return folder / "meta"


HF, NXD = "Hugging Face", "NxD (NxD Training)"
SHARDS = {
    "tensor parallel": 4,
    "pipeline parallel": 2,
    "layers of the stages": [1, 2],
    "kv multiplier": 2,
    "padded vocabulary": 100,
    "checksums": "compared when read",
}
KINDS: list[tuple[str, Make, str, str, dict[str, Any] | None]] = [
    ("hf", as_hf, HF, "transformers", None),
    ("bin", as_bin, HF, "transformers", None),
    ("plain", written(**SIZES), NXD, "same sizes", SHARDS | {"qkv": "split", "files": "plain"}),
    (
        "fused xser",
        written(**SIZES, qkv_linear=True, fuse_qkv=True, xser=True),
        NXD,
        "same sizes",
        SHARDS | {"qkv": "fused", "files": "xser"},
    ),
    ("native", written(to="native"), "nxdt-align's native engine (DCP)", "resume_from_checkpoint", None),
    ("meta", as_meta, "Meta's original download", "nxdt-align convert", None),
]


@pytest.mark.parametrize(
    ("make", "layout", "loader", "shards"), [c[1:] for c in KINDS], ids=[c[0] for c in KINDS]
)
def test_every_kind_is_told(
    make: Make, layout: str, loader: str, shards: dict[str, Any] | None, make_hf: MakeHF, tmp_path: Path
) -> None:
    path = make(make_hf, tmp_path)
    config = METAS if path.name == "meta" else CONFIG
    found = describe(path)
    assert found["layout"] == layout and loader in found["loaded by"]
    assert found["parameters"] == sum(map(prod, weight_shapes(config).values()))
    dtype = "float32" if path.name == "meta" else "bfloat16"
    assert found["dtypes"] == {dtype: len(weight_shapes(config))}
    assert found["bytes on disk"] >= found["parameters"] * (4 if path.name == "meta" else 2)
    assert found.get("shards") == shards
    assert found["model"]["kv heads"] == 2 and found["model"]["vocabulary"] == config.vocab_size
    last = config.num_hidden_layers - 1
    assert f"model.layers.{{0-{last}}}.mlp.gate_up_proj.up_proj.weight" in found["weights"]
    text = to_text(found)
    assert f"layout: {layout}" in text and f"parameters: {found['parameters']:,}" in text


def test_dtypes_are_counted(make_hf: MakeHF, tmp_path: Path) -> None:
    weights = fresh(CONFIG)
    weights["model.norm.weight"] = weights["model.norm.weight"].half()
    write_hf_folder(tmp_path / "mixed", CONFIG, weights)
    assert describe(tmp_path / "mixed")["dtypes"] == {"float16": 1, "float32": len(weights) - 1}


# Shards without a config.json

BARE: list[tuple[dict[str, Any], DecoderConfig, dict[str, Any]]] = [
    (SIZES, CONFIG, {"kv multiplier": 2, "qkv": "split", "files": "plain"}),
    (SIZES | {"qkv_linear": True, "fuse_qkv": True, "xser": True}, CONFIG, {"qkv": "fused", "files": "xser"}),
    (
        {"tp": 2, "pp": 2, "qkv_linear": False, "pipeline_cuts": (1,)},
        CONFIG,
        {"kv multiplier": 1, "qkv": "separate"},
    ),
    ({"tp": 2}, replace(CONFIG, num_key_value_heads=8), {"kv multiplier": 1, "qkv": "coalesced"}),
    (SIZES, replace(CONFIG, tie_word_embeddings=True), {"kv multiplier": 2}),
]


@pytest.mark.parametrize(("options", "config", "shards"), BARE)
def test_shards_alone_tell_what_they_can(
    options: dict[str, Any], config: DecoderConfig, shards: dict[str, Any], make_hf: MakeHF, tmp_path: Path
) -> None:
    run(make_hf(config, torch.float16), tmp_path / "out", **options)
    (tmp_path / "out" / "config.json").unlink()
    found = describe(tmp_path / "out")
    rows = -(-config.vocab_size // options["tp"]) * options["tp"]
    padded = replace(config, vocab_size=rows)
    assert found["parameters"] == sum(map(prod, weight_shapes(padded).values()))
    assert found["model"] == {
        "layers": 3,
        "hidden size": 16,
        "query heads x head dim": 32,
        "kv heads x head dim": 4 * config.num_key_value_heads,
        "intermediate size": 48,
        "vocabulary with its padding": rows,
        "tied head": config.tie_word_embeddings,
    }
    stages = [2, 1] if "pipeline_cuts" in options else [1, 2] if "pp" in options else [3]
    assert found["shards"].items() >= shards.items()
    assert found["shards"]["tensor parallel"] == options["tp"]
    assert found["shards"]["layers of the stages"] == stages
    assert found["shards"]["pipeline parallel"] == len(stages)
    assert found["shards"]["last rows of the embedding that are 0"] == rows - 99
    assert "float16" in found["dtypes"] and "--config" in found["unknown"]
    assert describe(tmp_path / "out" / "model")["shards"] == found["shards"]
    assert "kv heads x head dim" in to_text(found)


def misname(shard: Path) -> None:
    edit(shard, lambda tensors: tensors.update(surplus=torch.zeros(2)))


def reshape(shard: Path) -> None:
    edit(shard, lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :-1]}))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            misname,
            "(?s)tp_rank_02_pp_rank_00.pt does not fit dp_rank_00_tp_rank_00_pp_rank_00.pt.*surplus: surplus",
        ),
        (reshape, r"model.layers.0.mlp.down_proj.weight must have shape \[16, 12\], but has \[16, 11\]"),
        (Path.unlink, "Missing: dp_rank_00_tp_rank_02_pp_rank_00.pt"),
        (lambda shard: os.truncate(shard, 500), "tp_rank_02_pp_rank_00.pt is damaged"),
    ],
)
def test_shards_alone_that_are_damaged_are_refused(
    damage: Callable[[Path], Any], fault: str, nxdt: Path
) -> None:
    (nxdt / "config.json").unlink()
    damage(nxdt / "model" / shard_name(2, 0))
    with pytest.raises(WeightsError, match=fault):
        describe(nxdt)


def test_shards_of_which_a_stage_is_missing_are_refused(nxdt: Path) -> None:
    """Stage 0 holds the embedding."""
    (nxdt / "config.json").unlink()
    for rank in range(4):
        (nxdt / "model" / shard_name(rank, 1)).rename(nxdt / "model" / shard_name(rank, 0))
    with pytest.raises(WeightsError, match=r"holds no model\.embed_tokens\.weight: shards or .* missing"):
        describe(nxdt)
