"""Against NxD's own converter: equal bit for bit where it is right, and the cases where it fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import fresh, run
from nxd_source import supply_neuron_only_modules
from torch import Tensor

from nxdt_align.models.presets import DecoderConfig
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.names import to_hf
from nxdt_align.weights.nxdt_files import shard_name

pytestmark = pytest.mark.nxd

GQA = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=4,
)
FAILURES = (AssertionError, RuntimeError, IndexError, ValueError)
MHA = replace(GQA, num_key_value_heads=8)


@pytest.fixture
def converter() -> Any:
    supply_neuron_only_modules()
    try:
        from neuronx_distributed.scripts.checkpoint_converter import CheckpointConverterBase
    except ImportError as error:
        pytest.skip(f"neuronx_distributed cannot be imported: {error}")
    return CheckpointConverterBase()


def nxd(converter: Any, *arguments: object) -> None:
    flags = ["--hw_backend", "trn1", *map(str, arguments)]
    converter.run(converter.get_arg_parser().parse_args(flags))


def make(folder: Path, config: DecoderConfig) -> tuple[Path, Path]:
    """A Hugging Face folder, and the one merged file that NxD's converter takes."""
    weights = fresh(config)
    write_hf_folder(folder / "hf", config, weights)
    torch.save({to_hf(name): tensor for name, tensor in weights.items()}, folder / "merged.bin")
    return folder / "hf", folder / "merged.bin"


def load(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


# config, tp, pp, multiplier, flags of NxD's, options of ours
EQUAL: list[tuple[DecoderConfig, int, int, int, list[str], dict[str, bool]]] = [
    (GQA, 2, 1, 1, ["--qkv_linear", "True"], {"qkv_linear": True}),
    (GQA, 4, 1, 2, ["--qkv_linear", "True"], {"qkv_linear": True}),
    (GQA, 4, 2, 2, ["--qkv_linear", "True"], {"qkv_linear": True}),
    (GQA, 8, 3, 4, ["--qkv_linear", "True"], {"qkv_linear": True}),
    (GQA, 8, 5, 4, ["--qkv_linear", "True", "--fuse_qkv", "True"], {"qkv_linear": True, "fuse_qkv": True}),
    (GQA, 2, 2, 1, [], {"qkv_linear": False}),
    (MHA, 4, 2, 1, [], {"qkv_linear": False}),
    (MHA, 4, 3, 1, ["--coalesce_qkv", "True"], {"coalesce_qkv": True}),
    (MHA, 8, 1, 1, ["--qkv_linear", "True"], {"qkv_linear": True}),
]


@pytest.mark.parametrize(("config", "tp", "pp", "multiplier", "flags", "options"), EQUAL)
def test_shards_are_nxds_bit_for_bit(
    config: DecoderConfig,
    tp: int,
    pp: int,
    multiplier: int,
    flags: list[str],
    options: dict[str, bool],
    converter: Any,
    tmp_path: Path,
) -> None:
    hf, merged = make(tmp_path, config)
    sizes = ["--tp_size", tp, "--pp_size", pp, "--kv_size_multiplier", multiplier]
    places = ["--input_dir", merged, "--output_dir", tmp_path / "theirs", "--config", hf / "config.json"]
    layers = ["--n_layers", config.num_hidden_layers]
    nxd(converter, "--convert_from_full_state", *places, *sizes, *layers, *flags)
    run(hf, tmp_path / "ours", tp=tp, pp=pp, kv_multiplier=multiplier, **options)
    for rank in range(tp):
        for stage in range(pp):
            name = f"model/{shard_name(rank, stage)}"
            theirs, ours = load(tmp_path / "theirs" / name), load(tmp_path / "ours" / name)
            assert theirs.keys() == ours.keys()
            for key, tensor in theirs.items():
                assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key
    run(tmp_path / "theirs", tmp_path / "back", config=hf / "config.json")
    assert HFFolder(tmp_path / "back").fingerprint() == HFFolder(hf).fingerprint()


FAILS: list[tuple[str, DecoderConfig, int, int, list[str], dict[str, bool]]] = [
    ("tp below kv heads", MHA, 4, 1, ["--qkv_linear", "True"], {"qkv_linear": True}),
    ("copies of several kv heads per rank", GQA, 2, 2, ["--qkv_linear", "True"], {"qkv_linear": True}),
    ("vocabulary that does not divide", replace(GQA, vocab_size=99), 2, 1, [], {"qkv_linear": False}),
    ("head_dim of its own", replace(GQA, head_dim=6), 4, 2, ["--qkv_linear", "True"], {"qkv_linear": True}),
]


@pytest.mark.parametrize(
    ("config", "tp", "multiplier", "flags", "options"), [c[1:] for c in FAILS], ids=[c[0] for c in FAILS]
)
def test_where_nxds_converter_fails_or_is_wrong(
    config: DecoderConfig,
    tp: int,
    multiplier: int,
    flags: list[str],
    options: dict[str, bool],
    converter: Any,
    tmp_path: Path,
) -> None:
    hf, merged = make(tmp_path, config)
    sizes = ["--tp_size", tp, "--kv_size_multiplier", multiplier]
    places = ["--input_dir", merged, "--output_dir", tmp_path / "theirs", "--config", hf / "config.json"]
    run(hf, tmp_path / "ours", tp=tp, kv_multiplier=multiplier, **options)
    try:
        nxd(converter, "--convert_from_full_state", *places, *sizes, *flags)
    except FAILURES:
        pass
    else:
        theirs, ours = (load(tmp_path / f / "model" / shard_name(0, 0)) for f in ("theirs", "ours"))
        assert any(not torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    run(tmp_path / "ours", tmp_path / "back")
    assert HFFolder(tmp_path / "back").fingerprint() == HFFolder(hf).fingerprint()


def test_nxds_converter_cannot_split_what_it_has_fused(converter: Any, tmp_path: Path) -> None:
    """It cuts weight_qkv in three equal parts; here a rank holds 2 heads of q, 1 of k and 1 of v."""
    hf, merged = make(tmp_path, GQA)
    sizes = ["--tp_size", 4, "--kv_size_multiplier", 2, "--qkv_linear", "True", "--fuse_qkv", "True"]
    common = [*sizes, "--config", hf / "config.json", "--n_layers", 5]
    shards = tmp_path / "theirs"
    nxd(converter, "--convert_from_full_state", "--input_dir", merged, "--output_dir", shards, *common)
    with pytest.raises(FAILURES):
        places = ["--input_dir", shards / "model", "--output_dir", tmp_path / "full"]
        nxd(converter, "--convert_to_full_state", *places, *common)
    run(shards, tmp_path / "back", config=hf / "config.json")
    assert HFFolder(tmp_path / "back").fingerprint() == HFFolder(hf).fingerprint()
