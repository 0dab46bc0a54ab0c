"""Adapters in shards of engine nxd: read as they were divided, and what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import TINY
from torch import Tensor

from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.models.adapters import adapter_shapes
from nxdt_align.models.partition import Partition, local_tensors
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.nxdt_adapters import ShardedAdapter
from nxdt_align.weights.nxdt_files import shard_name

CONFIG = replace(TINY, vocab_size=64, num_attention_heads=8, head_dim=4)
SPEC = adapter_spec(
    CONFIG,
    target_modules=["all-linear"],
    modules_to_save=["embed_tokens", "lm_head", "norm"],
    rank=4,
    alpha=8,
    dora=True,
    from_adapter=True,
)
PARTITIONS = {
    "whole": Partition(CONFIG, adapters=SPEC),
    "tp4, copies of kv heads": Partition(CONFIG, 4, kv_multiplier=2, qkv="fused", adapters=SPEC),
    "tp2 pp2": Partition(CONFIG, 2, 2, qkv="separate", adapters=SPEC),
}


def divided(folder: Path, partition: Partition) -> dict[str, Tensor]:
    """Random adapters, written as the ranks' shards."""
    generator = torch.Generator().manual_seed(0)
    whole = {
        name: torch.randn(shape, generator=generator)
        for name, shape in adapter_shapes(CONFIG, SPEC).items()
        if SPEC.trains(name)
    }
    (folder / "model").mkdir()
    for stage in range(partition.pp):
        names = [name for name in local_tensors(partition, stage) if name in whole]
        for rank in range(partition.tp):
            shard = {}
            for name in names:
                dim, ranges = partition.ranges(name, rank)
                pieces = [whole[name].narrow(dim, start, stop - start) for start, stop in ranges]
                shard[name] = torch.cat(pieces, dim)
            torch.save(shard, folder / "model" / shard_name(rank, stage))
    return whole


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_tensor_is_read_as_it_was_divided(tmp_path: Path, name: str) -> None:
    whole = divided(tmp_path, PARTITIONS[name])
    adapter = ShardedAdapter(tmp_path, PARTITIONS[name])
    assert adapter.spec == SPEC
    for each, tensor in whole.items():
        assert torch.equal(adapter.read(each), tensor), each


def changed(folder: Path, rank: int, change: str) -> Partition:
    partition = Partition(CONFIG, 4, kv_multiplier=2, adapters=SPEC)
    divided(folder, partition)
    file = folder / "model" / shard_name(rank, 0)
    shard = torch.load(file, weights_only=True)
    name = "model.layers.1.self_attn.qkv_proj.k_proj.lora_B"
    if change == "missing":
        del shard[name]
    else:
        shard[name] = shard[name] + 1 if change == "copy" else shard[name][:1]
    torch.save(shard, file)
    return partition


def test_copies_that_differ_are_named(tmp_path: Path) -> None:
    adapter = ShardedAdapter(tmp_path, changed(tmp_path, 2, "copy"))
    with pytest.raises(WeightsError, match=r"rank 2 holds another copy of .*k_proj\.lora_B than an earlier"):
        adapter.read("model.layers.1.self_attn.qkv_proj.k_proj.lora_B")


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_what_does_not_fit_is_named(tmp_path: Path, change: str) -> None:
    partition = changed(tmp_path, 3, change)
    with pytest.raises(WeightsError, match=r"k_proj\.lora_B in dp_rank_00_tp_rank_03_pp_rank_00\.pt"):
        ShardedAdapter(tmp_path, partition)
