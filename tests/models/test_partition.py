"""The arithmetic of shards: against orders worked out by hand, and there and back over random sizes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nxdt_align.models.partition import (
    HEAD,
    QKV,
    Partition,
    PartitionError,
    default_multiplier,
    default_qkv,
    even_cuts,
    fitting_multipliers,
    fitting_tp,
    local_tensors,
)
from nxdt_align.models.presets import LLAMA3_8B, TINY, DecoderConfig, weight_shapes

Q = "model.layers.0.self_attn.qkv_proj.q_proj.weight"
K = "model.layers.0.self_attn.qkv_proj.k_proj.weight"
O = "model.layers.0.self_attn.o_proj.weight"  # noqa: E741
EIGHT_HEADS = replace(TINY, num_attention_heads=8, num_key_value_heads=2, head_dim=4)


def heads(partition: Partition, name: str, rank: int) -> list[int]:
    size = partition.config.head_dim
    return [h for start, stop in partition.ranges(name, rank)[1] for h in range(start // size, stop // size)]


def test_heads_of_replicated_kv_in_trn1_order() -> None:
    """8 query heads, 2 kv heads, tp 4: each kv head twice, K0 K1 K0 K1. The first copy of K0 takes
    queries 0 and 1 along, the second 2 and 3; K1's are 4 and 5, then 6 and 7."""
    partition = Partition(EIGHT_HEADS, tp=4, kv_multiplier=2)
    assert [heads(partition, K, rank) for rank in range(4)] == [[0], [1], [0], [1]]
    assert [heads(partition, Q, rank) for rank in range(4)] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert [heads(partition, O, rank) for rank in range(4)] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert partition.ranges(O, 1)[0] == 1 and partition.ranges(Q, 1)[0] == 0


def test_heads_without_replication_are_in_their_own_order() -> None:
    partition = Partition(EIGHT_HEADS, tp=2)
    assert partition.ranges(Q, 1) == (0, [(16, 32)])
    assert partition.ranges(K, 1) == (0, [(4, 8)])


def test_a_rank_with_several_replicated_heads_holds_the_queries_of_each() -> None:
    """tp 2 of the row K0 K1 K0 K1: both ranks hold K0 and K1, with different queries."""
    partition = Partition(EIGHT_HEADS, tp=2, kv_multiplier=2)
    assert [heads(partition, K, rank) for rank in (0, 1)] == [[0, 1], [0, 1]]
    assert [heads(partition, Q, rank) for rank in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_vocabulary_is_padded_to_what_divides() -> None:
    partition = Partition(replace(EIGHT_HEADS, vocab_size=99), tp=4, kv_multiplier=2)
    assert partition.padded_vocab == 100 and partition.whole_shape(HEAD) == (100, 32)
    assert partition.local_shape("model.embed_tokens.weight") == (25, 32)
    assert replace(partition, vocab=128).local_shape(HEAD) == (32, 32)


def test_layers_left_over_go_to_the_last_stages() -> None:
    """7 layers over 3 stages: 2, 2, 3; 8 over 3: 2, 3, 3."""
    assert even_cuts(7, 3) == (1, 3) and even_cuts(8, 3) == (1, 4)
    assert even_cuts(4, 4) == (0, 1, 2) and even_cuts(4, 1) == ()
    assert stages(Partition(replace(TINY, num_hidden_layers=7), pp=3)) == [0, 0, 1, 1, 2, 2, 2]


def test_a_stage_ends_after_each_cut() -> None:
    seven = replace(TINY, num_hidden_layers=7)
    assert stages(Partition(seven, pp=3, cuts=(0, 4))) == [0, 1, 1, 1, 1, 2, 2]
    assert stages(Partition(seven, pp=2, cuts=(5,))) == [0, 0, 0, 0, 0, 0, 1]


def stages(partition: Partition) -> list[int]:
    numbers = range(partition.config.num_hidden_layers)
    return [stage for i in numbers for stage in partition.stage_of(f"model.layers.{i}.mlp.down_proj.weight")]


@pytest.mark.parametrize("cuts", [(0,), (0, 1, 2), (4, 1), (1, 1), (1, 6), (-1, 3)])
def test_cuts_that_leave_a_stage_without_a_layer_are_refused(cuts: tuple[int, ...]) -> None:
    rule = r"pipeline_cuts must be 2 layers below the last \(6\) in ascending order"
    with pytest.raises(PartitionError, match=rule):
        Partition(replace(TINY, num_hidden_layers=7), pp=3, cuts=cuts)


@pytest.mark.parametrize(
    ("qkv", "names"),
    [
        ("split", ["qkv_proj.weight_q", "qkv_proj.weight_k", "qkv_proj.weight_v"]),
        ("fused", ["qkv_proj.weight_qkv"]),
        ("separate", ["q_proj.weight", "k_proj.weight", "v_proj.weight"]),
        ("coalesced", ["qkv_proj.weight"]),
    ],
)
def test_names_are_nxds(qkv: QKV, names: list[str]) -> None:
    config = replace(TINY, num_key_value_heads=4)
    found = local_tensors(Partition(config, pp=2, qkv=qkv), 1)
    prefix = "model.layers.1.self_attn."
    assert [n.removeprefix(prefix) for n in found if n.startswith(prefix)] == [*names, "o_proj.weight"]
    assert "model.layers.0.mlp.down_proj.weight" not in found
    gate_up = found["model.layers.1.mlp.gate_up_proj.weight"]
    assert [n.split(".")[-2] for n in gate_up] == ["gate_proj", "up_proj"]
    assert list(found)[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_a_tied_embedding_is_in_the_first_and_last_stage() -> None:
    partition = Partition(replace(TINY, tie_word_embeddings=True), pp=2)
    assert "model.embed_tokens.weight" in local_tensors(partition, 0)
    assert HEAD in local_tensors(partition, 1) and HEAD not in local_tensors(partition, 0)


def test_the_tutorials_sizes_are_the_defaults() -> None:
    """Llama-3-8B at tp 32: kv_replicator 4 and qkv_linear, as its YAML says."""
    assert default_multiplier(LLAMA3_8B, 32) == 4 and default_qkv(LLAMA3_8B, 32, 4) == "split"
    assert default_multiplier(LLAMA3_8B, 4) == 1 and default_qkv(LLAMA3_8B, 4, 1) == "separate"
    assert default_qkv(replace(TINY, num_key_value_heads=4), 2, 1) == "coalesced"
    assert fitting_tp(LLAMA3_8B) == [1, 2, 4, 8, 16, 32] and fitting_multipliers(LLAMA3_8B, 32) == [4]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_every_size_that_fits_has_defaults_that_do(kv_heads: int, group: int) -> None:
    """Also where ranks hold copies of several kv heads each: 3 kv heads of 12 query heads on 2 ranks are
    dealt twice, (K0 K1 K2)(K0 K1 K2), which separate layers do not do."""
    config = replace(TINY, num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads)
    config = replace(config, intermediate_size=config.num_attention_heads)
    for tp in fitting_tp(config):
        multiplier = default_multiplier(config, tp)
        Partition(config, tp, 1, multiplier, default_qkv(config, tp, multiplier))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"tp": 6}, "tensor-parallel size of 6 does not fit 8 query heads and 2 kv heads; .*: 1, 2, 4, 8"),
        (
            {"tp": 4},
            "kv multiplier of 1 does not spread 2 kv heads.*over 4 ranks; multipliers that fit: 2, 4",
        ),
        ({"tp": 4, "qkv": "separate"}, "fit with qkv_linear, as other layers have no copies: 2, 4"),
        ({"tp": 64}, "64 does not fit"),
        ({"pp": 3}, r"must be 1 to num_hidden_layers \(2\), but is 3"),
        ({"tp": 0}, "tensor-parallel size must be at least 1, but is 0"),
        ({"tp": 4, "kv_multiplier": 2, "qkv": "separate"}, "multiplier is 2; use qkv_linear"),
        ({"qkv": "coalesced"}, r"as many kv heads as query heads \(8\), but there are 2"),
        ({"tp": 2, "vocab": 129}, r"multiple of .*\(2\) and at least vocab_size \(128\), but is 129; 128"),
        ({"vocab": 100}, "at least vocab_size"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_those_that_do(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(PartitionError, match=fault):
        replace(Partition(EIGHT_HEADS), **changes)


def random_partition(rng: random.Random) -> Partition:
    kv_heads, group = rng.choice([1, 2, 3, 4, 6, 8]), rng.choice([1, 2, 3, 4, 6])
    layers = rng.randint(1, 5)
    config = DecoderConfig(
        vocab_size=rng.randint(20, 70),
        hidden_size=rng.choice([8, 24]),
        intermediate_size=rng.choice([48, 96, 144]),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([2, 4, 6]),
        tie_word_embeddings=rng.random() < 0.3,
    )
    tp = rng.choice(fitting_tp(config))
    multiplier = rng.choice(fitting_multipliers(config, tp))
    styles: list[QKV] = ["split", "fused"]
    if multiplier == 1:
        styles += ["separate", *(["coalesced"] if group == 1 else [])]  # type: ignore[list-item]
    return Partition(config, tp, rng.randint(1, layers), multiplier, rng.choice(styles))


def cut(weight: Tensor, partition: Partition, name: str, rank: int) -> Tensor:
    dim, ranges = partition.ranges(name, rank)
    return torch.cat([weight.narrow(dim, start, stop - start) for start, stop in ranges], dim)


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_on_as_many_ranks_as_it_should_be(seed: int) -> None:
    """Rows counted over the ranks: once, kv heads multiplier times, replicated weights tp times; and
    all ranks' shares have the announced shape."""
    partition = random_partition(random.Random(seed))
    for name in weight_shapes(partition.config):
        weight = torch.arange(torch.Size(partition.whole_shape(name)).numel()).view(
            partition.whole_shape(name)
        )
        shares = [cut(weight, partition, name, rank) for rank in range(partition.tp)]
        assert {tuple(share.shape) for share in shares} == {partition.local_shape(name)}
        counts = torch.bincount(torch.cat([share.flatten() for share in shares]), minlength=weight.numel())
        copies = partition.kv_multiplier if ".k_proj." in name or ".v_proj." in name else 1
        assert set(counts.tolist()) == {partition.tp if "norm" in name else copies}, name


@pytest.mark.parametrize("seed", range(40))
def test_every_query_meets_its_own_kv_head(seed: int) -> None:
    """On each rank, query i attends to kv i // (queries / kvs), as the layer computes it; and o_proj
    takes the heads in the same order."""
    partition = random_partition(random.Random(seed))
    group = partition.config.num_attention_heads // partition.config.num_key_value_heads
    for rank in range(partition.tp):
        queries, kvs = heads(partition, Q, rank), heads(partition, K, rank)
        each = len(queries) // len(kvs)
        assert [q // group for q in queries] == [kv for kv in kvs for _ in range(each)]
        assert heads(partition, O, rank) == queries


@pytest.mark.parametrize("seed", range(20))
def test_every_weight_is_on_its_stages(seed: int) -> None:
    partition = random_partition(random.Random(seed))
    held = [
        name for s in range(partition.pp) for part in local_tensors(partition, s).values() for name in part
    ]
    expected = set(weight_shapes(partition.config)) | {HEAD}
    assert sorted(held) == sorted(expected)
