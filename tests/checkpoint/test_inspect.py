"""What ``nxdt-align inspect`` says of each kind of checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import CONFIG, SIZES, MakeHF, fresh, run
from meta_fixture import CONFIG as METAS
from meta_fixture import write_meta

from nxdt_align.build.conversion import describe
from nxdt_align.checkpoint.hf import write_hf_folder
from nxdt_align.checkpoint.inspect import to_text
from nxdt_align.checkpoint.names import to_hf
from nxdt_align.models.presets import weight_shapes

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
SHARDS = {"tensor parallel": 4, "pipeline parallel": 2, "kv multiplier": 2, "padded vocabulary": 100}
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
