"""What lies around the compiled parts of engine native, priced: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.models.config import DecoderConfig, parameter_count
from nxdt_align.models.presets import LLAMA3_8B
from nxdt_align.planning.around_graphs import around
from nxdt_align.planning.devices import DEVICES
from nxdt_align.planning.workload import Formats, Workload

TRN2 = DEVICES["trn2"]
MODEL: DecoderConfig = replace(LLAMA3_8B, num_hidden_layers=2)
WHOLE = parameter_count(MODEL)
OUTSIDE = 2 * MODEL.vocab_size * MODEL.hidden_size + MODEL.hidden_size
MIXED = Formats(weight=2, gradient=4, master=4, state=8, activation=2)
WORK = Workload(MODEL, MIXED, rows=1, tokens=1024, responses=512, attention="scores", data_parallel=4)


def ring(nbytes: float, ranks: int = 4) -> float:
    """Seconds that a ring of all-gather or reduce-scatter takes within a node."""
    return nbytes * (ranks - 1) / ranks / TRN2.link_bandwidth


def test_ranks_that_share_nothing_sum_gradients_once() -> None:
    found = around(WORK, 0, TRN2, clips=False, reference_passes=0)
    assert found.once.collectives == pytest.approx(2 * ring(4 * WHOLE))
    # A gradient of bf16 added to a sum in float32; gradient, master and two states, and the weight's copy.
    assert found.micro_batch.memory == pytest.approx((2 + 8) * WHOLE / TRN2.memory_bandwidth)
    assert found.optimizer.seconds == pytest.approx((12 + 16 + 6) * WHOLE / TRN2.memory_bandwidth)


def test_zero1_gathers_and_reduces_once_a_step() -> None:
    found = around(replace(WORK, zero1=True), 0, TRN2, clips=True, reference_passes=0)
    assert found.once.collectives == pytest.approx(ring((2 + 4) * WHOLE))
    assert found.micro_batch.collectives == 0
    assert found.optimizer.seconds == pytest.approx((12 + 16 + 12) * WHOLE / 4 / TRN2.memory_bandwidth)


@pytest.mark.parametrize("reference_passes", [0, 1])
def test_fsdp_gathers_layers_twice_per_micro_batch(reference_passes: int) -> None:
    work = replace(WORK, fsdp=True)
    found = around(work, 0, TRN2, clips=False, reference_passes=reference_passes)
    gathered = 2 * (WHOLE - OUTSIDE) * (2 + reference_passes) + 2 * OUTSIDE * (1 + reference_passes)
    assert found.micro_batch.collectives == pytest.approx(ring(gathered + 4 * WHOLE))
    assert found.once.seconds == 0


def test_adapters_gather_the_base_and_reduce_their_own() -> None:
    """Rank 8 on q_proj alone: 8 x (4,096 + 4,096) values in each of 2 layers."""
    spec = adapter_spec(MODEL, target_modules=["q_proj"], rank=8, alpha=16)
    factors = 2 * 8 * (4096 + 4096)
    frozen = around(replace(WORK, adapters=spec), 0, TRN2, clips=False, reference_passes=0)
    assert frozen.once.collectives == pytest.approx(2 * ring(4 * factors))
    sharded = around(replace(WORK, adapters=spec, fsdp=True), 0, TRN2, clips=False, reference_passes=0)
    gathered = 2 * (2 * (WHOLE - OUTSIDE + factors) + OUTSIDE)
    assert sharded.micro_batch.collectives == pytest.approx(ring(gathered + 4 * factors))


def test_stages_send_hidden_states_and_their_gradients() -> None:
    """The middle stage of three has two neighbours: 1,024 tokens of 4,096 values in bf16, sent each way and
    received each way."""
    work = replace(WORK, model=LLAMA3_8B, stages=(10, 11, 11), data_parallel=1)
    one = 1024 * 4096 * 2 / TRN2.link_bandwidth
    for stage, neighbours in enumerate((1, 2, 1)):
        found = around(work, stage, TRN2, clips=False, reference_passes=0)
        assert found.micro_batch.collectives == pytest.approx(2 * neighbours * one)


def test_ranks_of_other_nodes_are_slower() -> None:
    """32 copies of 4 tensor-parallel ranks are two nodes of 64."""
    work = replace(WORK, tensor_parallel=4, data_parallel=32, zero1=True)
    near = around(replace(work, data_parallel=16), 0, TRN2, clips=False, reference_passes=0)
    far = around(work, 0, TRN2, clips=False, reference_passes=0)
    ratio = TRN2.link_bandwidth / TRN2.network_bandwidth * (31 / 32) / (15 / 16)
    assert far.once.collectives / near.once.collectives == pytest.approx(ratio)
