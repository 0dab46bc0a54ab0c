"""What a graph and a step take on paper, worked out by hand."""

from __future__ import annotations

import pytest
from hlo_fixture import module

from nxdt_align.planning.devices import DEVICES, Device, device_of
from nxdt_align.planning.graph_cost import Cost, StepCost, collective_seconds, price
from nxdt_align.planning.hlo import parse

DEVICE = Device.of_chip(
    *("test", 2, 4),
    memory=2**30,
    tflops=2,
    float32_tflops=0.5,
    memory_gbytes=2,
    link_gbytes=4,
    network_gbits=16,
)
"""A rank, per second: 1e12 multiplications and additions (a quarter in float32), 1e9 bytes of memory, 1e9
over the links and 0.5e9 between nodes."""


def cost(*lines: str) -> Cost:
    return price(parse(module(*lines)), DEVICE)


def product(dtype: str, rows: int, inner: int, columns: int) -> Cost:
    left, right = f"{dtype}[{rows},{inner}]{{1,0}}", f"{dtype}[{inner},{columns}]{{1,0}}"
    return cost(
        f"%p0.1 = {left} parameter(0)",
        f"%p1.2 = {right} parameter(1)",
        f"ROOT %dot.3 = {dtype}[{rows},{columns}]{{1,0}} dot({left} %p0.1, {right} %p1.2), "
        "lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )


def test_a_rank_has_its_share_of_a_chip() -> None:
    assert (DEVICE.flops, DEVICE.float32_flops, DEVICE.memory) == (1e12, 0.25e12, 2**29)
    assert (DEVICE.memory_bandwidth, DEVICE.link_bandwidth, DEVICE.network_bandwidth) == (1e9, 1e9, 0.5e9)
    trn1, trn2 = DEVICES["trn1"], DEVICES["trn2"]
    assert (trn1.flops, trn1.float32_flops, trn1.memory) == (95e12, 23.75e12, 16 * 2**30)
    assert (trn2.flops, trn2.memory) == (166.75e12, 24 * 2**30)


def test_a_device_of_one_physical_core_is_half_a_trn2s() -> None:
    """AWS's chip has eight: 83.4 TFLOP/s, 12 GiB and 362.5 GB/s each, 128 of them to a node."""
    one = device_of("trn2", 1)
    assert (one.name, one.cores_per_node) == ("trn2, lnc 1", 128)
    assert (one.flops, one.float32_flops, one.memory) == (667e12 / 8, 181e12 / 8, 12 * 2**30)
    assert (one.memory_bandwidth, one.link_bandwidth) == (2900e9 / 8, 640e9 / 8)
    assert one.network_bandwidth == 400e9 / 128
    assert (one.physical_cores, DEVICES["trn2"].physical_cores, DEVICES["trn1"].physical_cores) == (1, 2, 1)
    assert device_of("trn2", None) is device_of("trn2", 2) is DEVICES["trn2"]
    assert device_of("trn1", 1) is DEVICES["trn1"]


def test_a_product_takes_the_slower_of_its_multiplications_and_its_bytes() -> None:
    """2 x 4096^3 at 1e12 per second are 0.137 s; 3 x 4096^2 values of 2 bytes 0.1 s. Of 1 row, the bytes."""
    large = product("bf16", 4096, 4096, 4096)
    assert large == Cost(products=pytest.approx(2 * 4096**3 / 1e12))
    assert product("f32", 4096, 4096, 4096) == Cost(products=pytest.approx(2 * 4096**3 / 0.25e12))
    assert product("bf16", 1, 4096, 4096) == Cost(memory=pytest.approx(2 * (4096**2 + 2 * 4096) / 1e9))


@pytest.mark.parametrize(
    ("kind", "ranks", "seconds"),
    [
        ("all-gather", (0, 1), 0.5),
        ("all-reduce", (0, 1, 2, 3), 1.5),
        ("reduce-scatter", (0, 4), 1.0),
        ("all-reduce", (3,), 0.0),
    ],
)
def test_collectives_are_rings(kind: str, ranks: tuple[int, ...], seconds: float) -> None:
    """1e9 bytes: an all-gather over two sends half of it, an all-reduce over four twice three quarters;
    between nodes a byte takes twice as long."""
    assert collective_seconds(kind, 1e9, ranks, DEVICE) == pytest.approx(seconds)


def test_a_collective_is_read_off_its_graph() -> None:
    read = cost(
        "%p0.1 = f32[1000]{0} parameter(0)",
        "ROOT %a.2 = f32[4000]{0} all-gather(f32[1000]{0} %p0.1), replica_groups={{0,1,2,3}}, dimensions={0}",
    )
    assert read == Cost(collectives=pytest.approx(16000 * 3 / 4 / 1e9))


def test_what_is_fused_costs_a_pass_over_inputs_and_results() -> None:
    """As an optimizer's step: two inputs of 4,000 bytes are read, one result written, the sum neither."""
    read = cost(
        "%p0.1 = f32[1000]{0} parameter(0)",
        "%p1.2 = f32[1000]{0} parameter(1)",
        "%add.3 = f32[1000]{0} add(f32[1000]{0} %p0.1, f32[1000]{0} %p1.2)",
        "%mul.4 = f32[1000]{0} multiply(f32[1000]{0} %add.3, f32[1000]{0} %p0.1)",
        "ROOT %tuple.5 = (f32[1000]{0}) tuple(f32[1000]{0} %mul.4)",
    )
    assert read == Cost(memory=pytest.approx(12000 / 1e9))


@pytest.mark.parametrize(("width", "by_element", "nbytes"), [(1024, False, 2048), (1024, True, 1024 * 512)])
def test_short_slices_cost_as_much_as_long_ones(width: int, by_element: bool, nbytes: int) -> None:
    """256 rows of 1,024 values in bf16, read and written: as rows, or each value by itself."""
    size, dims = ("1,1", "") if by_element else (f"1,{width}", "1")
    read = cost(
        f"%p0.1 = bf16[512,{width}]{{1,0}} parameter(0)",
        "%p1.2 = s32[256]{0} parameter(1)",
        f"ROOT %gather.3 = bf16[256,{width}]{{1,0}} gather("
        f"bf16[512,{width}]{{1,0}} %p0.1, s32[256]{{0}} %p1.2), "
        f"offset_dims={{{dims}}}, start_index_map={{0}}, index_vector_dim=1, slice_sizes={{{size}}}",
    )
    assert read == Cost(memory=pytest.approx(2 * 256 * nbytes / 1e9))


def test_flash_attention_computes_half_of_the_scores() -> None:
    """(1, 4, S, 128): forward two products of 2 x S x S x 128 per head, halved; backward five."""
    shape, norms = "bf16[1,4,16384,128]{3,2,1,0}", "f32[1,4,16384]{2,1,0}"
    inputs = [f"%p{n}.1 = {shape} parameter({n})" for n in range(5)] + [f"%p5.1 = {norms} parameter(5)"]
    one = 2 * 4 * 16384 * 16384 * 128 / 2
    forward = cost(
        *inputs,
        f"ROOT %f.2 = ({shape}, {norms}) custom-call({shape} %p0.1, {shape} %p1.1, {shape} %p2.1), "
        'custom_call_target="nki_flash_fwd"',
    )
    assert forward == Cost(products=pytest.approx(2 * one / 1e12))
    backward = cost(
        *inputs,
        f"ROOT %b.2 = ({shape}, {shape}, {shape}) custom-call({shape} %p0.1, {shape} %p1.1, {shape} %p2.1, "
        f'{shape} %p3.1, {norms} %p5.1, {shape} %p4.1), custom_call_target="nki_flash_bwd"',
    )
    assert backward == Cost(products=pytest.approx(5 * one / 1e12))


def test_a_bias_is_read_by_each_head_and_shared_prompts_compute_all_scores() -> None:
    shape, norms, bias = "bf16[1,4,512,16]{3,2,1,0}", "f32[1,4,512]{2,1,0}", "bf16[1,1,512,512]{3,2,1,0}"
    read = cost(
        *(f"%p{n}.1 = {shape} parameter({n})" for n in range(3)),
        f"%p3.1 = {bias} parameter(3)",
        f"ROOT %f.2 = ({shape}, {norms}) custom-call({shape} %p0.1, {shape} %p1.1, {shape} %p2.1, "
        f'{bias} %p3.1), custom_call_target="nki_flash_fwd", backend_config="full"',
    )
    values = 4 * 512 * 16
    assert read == Cost(memory=pytest.approx((4 * 2 * values + 4 * 4 * 512 + 4 * 2 * 512**2) / 1e9))
    assert 2 * 2 * values * 512 / 1e12 < read.memory, "the bytes are the slower part"


def test_a_step_is_its_micro_batches_and_the_optimizer() -> None:
    step = StepCost(
        shape=(1, 64, 16, 2),
        micro_batches=3,
        examples=10,
        first=Cost(products=1.0),
        later=Cost(products=1.0, memory=0.5),
        optimizer=Cost(collectives=1.0),
        flops=10**12,
    )
    assert step.cost == Cost(products=3.0, memory=1.0, collectives=1.0)
    totals = step.totals(DEVICE)
    assert totals["seconds"] == 5.0 and totals["examples_per_second"] == 2.0
    assert (totals["products"], totals["peak"]) == (0.6, pytest.approx(0.2))
