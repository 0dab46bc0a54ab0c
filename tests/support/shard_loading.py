"""Shards of random sizes, and the logits of native engines that start from them in several processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parallel_fixture import whole
from torch import Tensor

from nxdt_align.batch import Batch, SlotRole, TokenStatistic, Topology
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.parallelize import whole_rows
from nxdt_align.engines.native.scoring import NativeScorer
from nxdt_align.engines.native.settings import Parallel
from nxdt_align.engines.steps import TokenLogps
from nxdt_align.models.partition import QKV, fitting_multipliers, fitting_tp
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.ragged import Rows

WORLD, ROWS, TOKENS = 4, 2, 11

SPREADS = {
    "tp2": Parallel(tensor=2),
    "tp4": Parallel(tensor=4, sequence_parallel=True),
    "pp2": Parallel(pipeline=2),
    "pp2 tp2": Parallel(pipeline=2, tensor=2, sequence_parallel=True),
}
"""What is left of four processes is data parallel and computes the same."""
STYLES: dict[QKV, dict[str, bool]] = {
    "split": {"qkv_linear": True},
    "fused": {"qkv_linear": True, "fuse_qkv": True},
    "separate": {"qkv_linear": False},
    "coalesced": {"coalesce_qkv": True},
}
KINDS: list[tuple[QKV, int]] = [("split", 1), ("split", 2), ("fused", 1), ("fused", 2), ("separate", 1)]


@dataclass(frozen=True)
class Case:
    """A model, the sizes of its shards, and how the engine is spread, which are independent."""

    parallel: Parallel
    config: DecoderConfig
    sizes: dict[str, Any]
    qkv: QKV


def draw(spread: str, qkv: QKV, multiplier: int, *, tied: bool = False) -> Case:
    """Random numbers of heads and sizes that ``spread`` and the layout allow."""
    parallel = SPREADS[spread]
    rng = random.Random(f"{spread} {qkv} {multiplier} {tied}")
    # At tp 4, fewer kv heads than ranks, so that each rank computes one that others have too.
    kv_heads = rng.choice([1, 2] if parallel.tensor == 4 else [2, 4])
    group = 1 if qkv == "coalesced" else rng.choice([g for g in (2, 4, 6) if kv_heads * g % 4 == 0])
    config = DecoderConfig(
        vocab_size=4 * rng.randint(10, 16) + (2 if parallel.tensor < 4 else 0),
        hidden_size=rng.choice([48, 96]),
        intermediate_size=48,
        num_hidden_layers=rng.choice([2, 3]),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([4, 6]),
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    tp = max(n for n in fitting_tp(config) if multiplier in fitting_multipliers(config, n))
    sizes = {"tp": tp, "pp": rng.randint(1, config.num_hidden_layers), "kv_multiplier": multiplier}
    padded = (config.vocab_size // lcm(tp, 8) + 1) * lcm(tp, 8)
    others = {"vocab": rng.choice([None, padded]), "xser": rng.random() < 0.5}
    return Case(parallel, config, sizes | STYLES[qkv] | others, qkv)


CASES = {
    **{f"{s}, {qkv} {m}": draw(s, qkv, m) for s in SPREADS for qkv, m in KINDS},
    **{f"{s}, {qkv} {m}, tied": draw(s, qkv, m, tied=True) for s in ("tp2", "tp4") for qkv, m in KINDS[1:3]},
    "tp2, coalesced 1": draw("tp2", "coalesced", 1),
}


def random_ids(config: DecoderConfig) -> Tensor:
    return torch.randint(config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(5))


def batch_of(ids: Tensor) -> Batch:
    """One example per row, of which every token but the first is a response's."""
    rows, tokens = ids.shape
    count = torch.arange(tokens).expand(rows, -1)
    valid = torch.tensor([True, False]).expand(rows, -1)
    return Batch(
        input_ids=ids,
        position_ids=count,
        key_start=torch.zeros_like(ids, dtype=torch.int32),
        key_stop=(count + 1).int(),
        response_positions=count[:, :-1],
        labels=ids[:, 1:],
        slot_index=torch.zeros_like(ids[:, 1:]),
        slot_valid=valid,
        slot_role=torch.full(valid.shape, int(SlotRole.SINGLE)),
        desirable=valid,
        record_index=torch.zeros_like(valid, dtype=torch.long),
        global_pairs=torch.tensor(float(rows)),
        global_tokens=torch.tensor(float(rows * (tokens - 1))),
    )


Scores = tuple[list[Tensor], Tensor]
"""The (B, S, V) logits, on ranks of the last stage alone, and the rows' log-probabilities, (B,)."""


def scores(rank: int, case: Case, shards: Path) -> Scores:
    """Of an engine that starts from ``resume_from_checkpoint: <shards>``."""
    from nxdt_align.run.assemble import weights_at

    parallel, config = case.parallel, case.config
    sizes = {"tensor_parallel_size": parallel.tensor, "pipeline_parallel_size": parallel.pipeline}
    topology = Topology.of_rank(rank, WORLD, **sizes)
    engine = NativeEngine(config, DenseAttention(), topology=topology, parallel=parallel)
    engine.load_weights(weights_at(shards, config, "exp_manager.resume_from_checkpoint"))
    seen: list[Tensor] = []
    read = NativeScorer.read

    def keeping(
        scorer: NativeScorer, hidden: Tensor, rows: Rows, wanted: Sequence[TokenStatistic]
    ) -> TokenLogps:
        seen.append(whole_rows(hidden, scorer._groups)[:, :TOKENS] @ whole(scorer.decoder.head_weight).T)
        return read(scorer, hidden, rows, wanted)

    with mock.patch.object(NativeScorer, "read", keeping):
        logps = engine.response_logps(batch_of(random_ids(config)))
    return seen, logps[:, 0]


def all_scores(rank: int, world: int, folder: Path, cases: dict[str, Case]) -> list[Scores]:
    """For ``run_parallel``: every case in turn."""
    return [scores(rank, case, folder / name / "pretrained_ckpt") for name, case in cases.items()]
