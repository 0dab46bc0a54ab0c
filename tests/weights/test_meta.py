"""Meta's download: weights, their order, their shape, and what is wrong with a damaged one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import fresh, run
from meta_fixture import CONFIG, write_meta
from torch import Tensor

from nxdt_align.run.conversion import open_weights
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.meta import MetaFolder


@pytest.mark.parametrize(("shards", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
def test_weights_are_those_that_it_was_made_of(shards: int, embedding_dim: int, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", CONFIG, shards, embedding_dim)
    run(tmp_path / "meta", tmp_path / "hf", to="hf")
    source, weights = HFFolder(tmp_path / "hf"), fresh(CONFIG)
    assert all(torch.equal(source.read(name), weights[name]) for name in weights)
    assert open_weights(tmp_path / "hf")[1] == CONFIG


def test_logits_are_those_of_metas_own_rotation(tmp_path: Path) -> None:
    """Meta rotates pairs (2i, 2i+1) of a head by position * theta^(-2i/d); the reordered rows must give
    the same products of queries and keys under Hugging Face's (i, i + d/2)."""
    write_meta(tmp_path / "meta", CONFIG, 1, 0)
    raw = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    source, d = MetaFolder(tmp_path / "meta"), CONFIG.head_dim
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(5)[:, None] * CONFIG.rope_theta ** (-torch.arange(0, d, 2) / d)

    def metas(weight: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ weight.t()).view(5, -1, d // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(()), angle)[:, None]).flatten(2)

    def huggingface(weight: Tensor) -> Tensor:
        states = (x @ weight.t()).view(5, -1, d)
        cos, sin = (torch.cat((f(angle), f(angle)), -1)[:, None] for f in (torch.cos, torch.sin))
        return states * cos + torch.cat((-states[..., d // 2 :], states[..., : d // 2]), -1) * sin

    prefix = "model.layers.0.self_attn.qkv_proj."
    theirs = [metas(raw[f"layers.0.attention.w{kind}.weight"])[:, 0] for kind in "qk"]
    ours = [huggingface(source.read(f"{prefix}{kind}_proj.weight"))[:, 0] for kind in "qk"]
    torch.testing.assert_close(ours[0] @ ours[1].t(), theirs[0] @ theirs[1].t())


def test_shape_follows_from_params(tmp_path: Path) -> None:
    write_meta(tmp_path / "one", CONFIG, 1, 0, use_scaled_rope=True, vocab_size=-1)
    config = MetaFolder(tmp_path / "one").config
    assert config.rope_scaling is not None and config.rope_scaling.factor == 8
    assert config.max_position_embeddings == 131072 and config.vocab_size == 48
    write_meta(tmp_path / "two", replace(CONFIG, tie_word_embeddings=True), 1, 0)
    assert MetaFolder(tmp_path / "two").config.tie_word_embeddings
    write_meta(tmp_path / "three", CONFIG, 1, 0, rope_theta=None)
    old = MetaFolder(tmp_path / "three").config
    assert (old.rope_theta, old.max_position_embeddings, old.bos_token_id) == (10000.0, 4096, 1)


def test_a_head_that_is_the_embedding_is_tied(tmp_path: Path) -> None:
    """Llama 3.2's download holds both. Where a given config.json says that they are tied, they must be."""
    write_meta(tmp_path / "meta", CONFIG, 1, 0)
    tied = tmp_path / "config.json"
    tied.write_text(json.dumps(replace(CONFIG, tie_word_embeddings=True).to_hf_dict()))
    with pytest.raises(WeightsError, match=r"output.weight and tok_embeddings.weight differ"):
        run(tmp_path / "meta", tmp_path / "hf", to="hf", config=tied)
    file = tmp_path / "meta" / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors | {"output.weight": tensors["tok_embeddings.weight"].clone()}, file)
    for name, config in (("found out", None), ("given", tied)):
        run(tmp_path / "meta", tmp_path / name, to="hf", config=config)
        source, shape = open_weights(tmp_path / name)
        assert shape.tie_word_embeddings and "lm_head.weight" not in source.names()


def lose_param(folder: Path) -> None:
    values = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({k: v for k, v in values.items() if k != "n_heads"}))


def lose(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob("*.pth"):
            tensors = torch.load(file, weights_only=True)
            torch.save({n: t for n, t in tensors.items() if n != name}, file)

    return change


def reshape(folder: Path) -> None:
    tensors = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save(tensors | {"output.weight": torch.ones(3, 16)}, folder / "consolidated.01.pth")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda f: (f / "consolidated.00.pth").unlink(), "has no consolidated.00.pth"),
        (lambda f: (f / "consolidated.01.pth").unlink(), "or a shard is missing"),
        (lambda f: (f / "params.json").unlink(), "params.json cannot be read"),
        (lose_param, "params.json has no usable 'n_heads': give the model's config.json with --config"),
        (lose("tok_embeddings.weight"), "params.json: missing: model.embed_tokens.weight"),
        (lose("layers.0.attention.wo.weight"), "missing: model.layers.0.self_attn.o_proj.weight"),
        (
            reshape,
            r"consolidated.01.pth does not fit .*output.weight must have shape \[24, 16\], but has \[3, 16\]",
        ),
    ],
)
def test_a_damaged_download_is_refused(damage: Any, fault: str, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", CONFIG, 2, 0)
    damage(tmp_path / "meta")
    with pytest.raises(WeightsError, match=f"(?s){fault}"):
        run(tmp_path / "meta", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
