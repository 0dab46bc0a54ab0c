"""HLO's text read into instructions, and what is found in graphs. The texts are as XLA prints them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hlo_fixture import ADD, HEAD, Traced, module

from nxdt_align.planning.devices import DEVICES
from nxdt_align.planning.graph_report import GraphReport, report, to_dict, to_text
from nxdt_align.planning.hlo import HloError, Shape, parse
from nxdt_align.run.graphs import compare

TRN1 = DEVICES["trn1"]


def found(*lines: str, low_precision: bool = False) -> GraphReport:
    return report(Traced(module(*lines)), TRN1, low_precision=low_precision)


def test_a_module_is_read() -> None:
    read = parse(
        module(
            "%p0.1 = f32[4,4]{1,0} parameter(0)",
            '%constant.2 = f32[2]{0} constant({1, 2}), metadata={op_name="a (b"}',
            "%tuple.3 = (f32[4,4]{1,0}, /*index=1*/f32[2]{0}) "
            "tuple(f32[4,4]{1,0} %p0.1, f32[2]{0} %constant.2)",
            "%get-tuple-element.4 = f32[4,4]{1,0} "
            "get-tuple-element((f32[4,4]{1,0}, f32[2]{0}) %tuple.3), index=0",
            "ROOT %all-reduce.5 = f32[4,4]{1,0} all-reduce(f32[4,4]{1,0} %get-tuple-element.4), "
            "replica_groups={{0,1},{2,3}}, constrain_layout=true, to_apply=%AddComputation.5",
        )
    )
    parameter, constant, pair, element, reduced = read.entry.instructions
    assert (parameter.literal, constant.literal, constant.operands) == ("0", "{1, 2}", ())
    assert pair.shapes == (Shape("f32", (4, 4)), Shape("f32", (2,))) and pair.nbytes == 4 * 16 + 4 * 2
    assert pair.operands == ("p0.1", "constant.2") and element.operands == ("tuple.3",)
    assert (reduced.groups, reduced.group_size) == ("{{0,1},{2,3}}", 2)
    assert [c.name for c in read.computations()] == ["IrToHlo.9"], "an addition of a reduction does not count"


def test_loops_and_branches_count() -> None:
    body = ADD.replace("AddComputation.5", "body.1").replace("(x.6: f32[], y.7: f32[])", "(x.6: (f32[]))")
    text = module(
        "%p0.1 = f32[] parameter(0)",
        "ROOT %while.2 = f32[] while(f32[] %p0.1), condition=%body.1, body=%body.1",
    ).replace("ENTRY", body + "ENTRY")
    assert [c.name for c in parse(text).computations()] == ["IrToHlo.9", "body.1"]
    (finding,) = report(Traced(text), TRN1, low_precision=False).findings
    assert (finding.rule, finding.what) == ("kinds", "while, 1 times")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD, "no entry"),
        ("module @IrToHlo {", "starts no computation"),
        (module("return %p0"), "no instruction"),
        (module("%p0.1 = q7[4] parameter(0)"), "unknown type: q7"),
        (module("%p0.1 = f32[4] parameter(0"), "not closed"),
    ],
)
def test_what_is_no_hlo_is_refused(text: str, words: str) -> None:
    with pytest.raises(HloError, match=words):
        parse(text)


PRODUCT = (
    "%p0.1 = {0}[128,64]{{1,0}} parameter(0)",
    "%p1.2 = {0}[64,32]{{1,0}} parameter(1)",
    "ROOT %dot.3 = {0}[128,32]{{1,0}} dot({0}[128,64]{{1,0}} %p0.1, {0}[64,32]{{1,0}} %p1.2), "
    "lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}",
)


@pytest.mark.parametrize(
    ("dtype", "low", "rules"), [("f32", True, ["float32 products"]), ("f32", False, []), ("bf16", True, [])]
)
def test_products_are_priced(dtype: str, low: bool, rules: list[str]) -> None:
    """2 x 128 x 64 x 32 operations, 128 x 64 + 64 x 32 + 128 x 32 values."""
    read = found(*(line.format(dtype) for line in PRODUCT), low_precision=low)
    (product,) = read.products
    size = 4 if dtype == "f32" else 2
    assert (product.flops, product.nbytes, product.count) == (524288, 14336 * size, 1)
    assert [finding.rule for finding in read.findings] == rules


def gather(rows: int, width: int, by_element: bool) -> GraphReport:
    size = "1,1" if by_element else f"1,{width}"
    dims = "" if by_element else "1"
    return found(
        f"%p0.1 = bf16[512,{width}]{{1,0}} parameter(0)",
        f"%p1.2 = s32[{rows}]{{0}} parameter(1)",
        f"ROOT %gather.3 = bf16[{rows},{width}]{{1,0}} "
        f"gather(bf16[512,{width}]{{1,0}} %p0.1, s32[{rows}]{{0}} %p1.2), offset_dims={{{dims}}}, "
        f"start_index_map={{0}}, index_vector_dim=1, slice_sizes={{{size}}}",
    )


def test_single_elements_are_found() -> None:
    (slices,) = (by_element := gather(256, 1024, by_element=True)).slices
    assert (slices.slices, slices.slice_elements, slices.single) == (256 * 1024, 1, True)
    (finding,) = by_element.findings
    assert finding.rule == "single elements" and "262,144" in finding.what
    (slices,) = (by_row := gather(256, 1024, by_element=False)).slices
    assert (slices.slices, slices.slice_elements, slices.single) == (256, 1024, False)
    assert by_row.findings == [] and gather(4, 8, by_element=True).findings == []


def test_single_elements_of_a_scatter_are_found() -> None:
    """A scatter's slices are its updates, by their window."""
    lines = (
        "%p0.1 = f32[512,1024]{1,0} parameter(0)",
        "%p1.2 = s32[256]{0} parameter(1)",
        "%p2.3 = f32[256,1024]{1,0} parameter(2)",
        "ROOT %scatter.4 = f32[512,1024]{1,0} scatter(f32[512,1024]{1,0} %p0.1, s32[256]{0} %p1.2, "
        "f32[256,1024]{1,0} %p2.3), update_window_dims={WINDOW}, to_apply=%AddComputation.5",
    )
    by_row = found(*(line.replace("WINDOW", "1") for line in lines))
    by_element = found(*(line.replace("WINDOW", "") for line in lines))
    assert by_row.findings == [] and by_row.slices[0].slice_elements == 1024
    assert [f.rule for f in by_element.findings] == ["single elements"]


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        (["ROOT %p0.1 = f64[] parameter(0)"], "64-bit floats"),
        (
            ["%p0.1 = f32[] parameter(0)", "ROOT %power.2 = f32[] power(f32[] %p0.1, f32[] %p0.1)"],
            "powers",
        ),
        (
            [
                "%p0.1 = s32[8]{0} parameter(0)",
                "%convert.2 = f32[8]{0} convert(s32[8]{0} %p0.1)",
                "%divide.3 = f32[8]{0} divide(f32[8]{0} %convert.2, f32[8]{0} %convert.2)",
                "ROOT %floor.4 = f32[8]{0} floor(f32[8]{0} %divide.3)",
            ],
            "integer divisions",
        ),
        (
            [
                "%p0.1 = s64[8]{0} parameter(0)",
                "ROOT %r.2 = s64[8]{0} remainder(s64[8]{0} %p0.1, s64[8]{0} %p0.1)",
            ],
            "integer divisions",
        ),
        (
            [
                "%p0.1 = s32[8]{0} parameter(0)",
                "ROOT %a.2 = s32[8]{0} all-reduce(s32[8]{0} %p0.1), replica_groups={{0,1}}",
            ],
            "integer collectives",
        ),
        (["ROOT %p0.1 = f32[<=8]{0} parameter(0)"], "kinds"),
        (
            [
                "%p0.1 = f32[8]{0} parameter(0)",
                'ROOT %c.2 = f32[8]{0} custom-call(f32[8]{0} %p0.1), custom_call_target="x"',
            ],
            "kinds",
        ),
    ],
)
def test_each_rule_finds_its_own(lines: list[str], rule: str) -> None:
    read = found(*lines)
    assert [finding.rule for finding in read.findings] == [rule]
    assert f"  {rule} (graph 1): " in to_text(3, [read], [], TRN1)


def test_powers_of_a_number_are_none() -> None:
    """As of x.square(): the exponent is a constant, spread to the shape."""
    lines = (
        "%p0.1 = f32[8]{0} parameter(0)",
        "%constant.2 = f32[] constant(2)",
        "%broadcast.3 = f32[8]{0} broadcast(f32[] %constant.2), dimensions={}",
        "ROOT %power.4 = f32[8]{0} power(f32[8]{0} %p0.1, f32[8]{0} %broadcast.3)",
    )
    assert found(*lines).findings == []


def test_reports_are_text_and_json() -> None:
    read = found(*(line.format("bf16") for line in PRODUCT))
    table: dict[str, Any] = json.loads(json.dumps(to_dict(3, [read], [], TRN1)))
    assert table["rank"] == 3 and table["graphs"][0]["products"][0]["flops"] == 524288
    said = to_text(3, [read], [], TRN1)
    assert "1. training step, rows x tokens, response tokens, responses: 1 x 64, 16, 2" in said
    assert "bf16[128,32] = bf16[128,64] x bf16[64,32]" in said and said.endswith("findings: none")


def test_findings_that_cost_most_come_first() -> None:
    """Within a graph, over graphs, and over ranks, where each stands once and with its advice: a remainder
    that is found before the sum of more integers, a call that costs least in a graph before both."""
    division = (
        "%p0.1 = s64[8]{0} parameter(0)",
        "%r.2 = s64[8]{0} remainder(s64[8]{0} %p0.1, s64[8]{0} %p0.1)",
        "%p1.3 = s32[999]{0} parameter(1)",
        "ROOT %a.4 = s32[999]{0} all-reduce(s32[999]{0} %p1.3), replica_groups={{0,1}}",
    )
    call = (
        "%p0.1 = f32[8]{0} parameter(0)",
        'ROOT %c.2 = f32[8]{0} custom-call(f32[8]{0} %p0.1), custom_call_target="x"',
    )
    reads = [found(*call), found(*division)]
    expected = ["integer collectives", "integer divisions", "kinds"]
    assert [finding.rule for finding in reads[1].findings] == expected[:2]
    tables = [json.loads(json.dumps(to_dict(rank, reads, [], TRN1))) for rank in (0, 1)]
    for said, sign in ((to_text(0, reads, [], TRN1), "  "), (compare(tables), "finding: ")):
        lines = [line.removeprefix(sign) for line in said.splitlines()[-3:]]
        assert [line.split(" (graph")[0].split(":")[0] for line in lines] == expected
        assert lines[1].endswith("work them out on the host, where the rows are laid (data/collate.py)")
