"""A part of a weight, from every kind of folder, is the same as that part of the whole weight."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_fixture import CONFIG, MakeHF, fresh, run
from torch import nn

from nxdt_align.engines.base import WeightSource
from nxdt_align.engines.native.checkpoint import NativeCheckpoint
from nxdt_align.engines.native.saving import save
from nxdt_align.weights import extents
from nxdt_align.weights.extents import Extent, WeightsError, read_region
from nxdt_align.weights.hf import FreshWeights, HFFolder
from nxdt_align.weights.names import to_hf
from nxdt_align.weights.nxdt import NxDTFolder


def safetensors(make_hf: MakeHF, tmp_path: Path) -> WeightSource:
    return HFFolder(make_hf(CONFIG, torch.bfloat16))


def torch_file(make_hf: MakeHF, tmp_path: Path, legacy: bool = False) -> WeightSource:
    folder = make_hf(CONFIG)
    (folder / "model.safetensors").unlink()
    tensors = {
        to_hf(name): tensor.t() if tensor.ndim == 2 else tensor for name, tensor in fresh(CONFIG).items()
    }
    tensors = {
        name: tensor.contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()
    }
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return HFFolder(folder)


def old_torch_file(make_hf: MakeHF, tmp_path: Path) -> WeightSource:
    return torch_file(make_hf, tmp_path, legacy=True)


def sharded(make_hf: MakeHF, tmp_path: Path) -> WeightSource:
    run(make_hf(CONFIG), tmp_path / "nxdt", tp=4, pp=2, kv_multiplier=2, qkv_linear=True)
    return NxDTFolder(tmp_path / "nxdt", CONFIG)


def fused(make_hf: MakeHF, tmp_path: Path) -> WeightSource:
    run(make_hf(CONFIG), tmp_path / "nxdt", tp=2, qkv_linear=True, fuse_qkv=True, xser=True)
    return NxDTFolder(tmp_path / "nxdt", CONFIG)


def native(make_hf: MakeHF, tmp_path: Path) -> WeightSource:
    save(tmp_path / "native", [(name, nn.Parameter(t)) for name, t in fresh(CONFIG).items()], None, {})
    return NativeCheckpoint(tmp_path / "native")


def drawn(make_hf: MakeHF, tmp_path: Path) -> WeightSource:
    return FreshWeights(replace(CONFIG, initializer_range=0.3), 3)


@pytest.mark.parametrize("kind", [safetensors, torch_file, old_torch_file, sharded, fused, native, drawn])
def test_a_part_is_that_of_the_whole(
    kind: Callable[[MakeHF, Path], WeightSource], make_hf: MakeHF, tmp_path: Path
) -> None:
    source, rng = kind(make_hf, tmp_path), random.Random(0)
    for name in source.names():
        whole = source.read(name)
        assert source.read_slice(name, tuple(slice(0, n) for n in whole.shape)).equal(whole), name
        for _ in range(6):
            bounds = [sorted(rng.choices(range(size + 1), k=2)) for size in whole.shape]
            region = tuple(slice(*pair) for pair in bounds)
            part = source.read_slice(name, region)
            assert part.dtype == whole.dtype and part.equal(whole[region]), (name, region)


def test_no_byte_of_another_part_is_read(make_hf: MakeHF, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns too: each rank of a row-parallel weight reads its own."""
    source, read = HFFolder(make_hf(CONFIG)), 0
    preadv = extents.os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        read += sum(map(len, buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(extents.os, "preadv", counting)
    source.read_slice("model.layers.0.mlp.down_proj.weight", (slice(0, 16), slice(12, 24)))
    assert read == 16 * 12 * 4


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(4 * 40))
    extent = Extent(file, 0, torch.float32, (10, 5))
    for region in ((slice(7, 9), slice(0, 5)), (slice(7, 9), slice(1, 2))):
        with pytest.raises(WeightsError, match="it ends before the bytes of a tensor"):
            read_region(extent, region)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_region(replace(extent, path=tmp_path / "none"), (slice(0, 1), slice(0, 1)))
