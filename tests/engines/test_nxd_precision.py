"""Formats of gradients on the NxD engine: how micro-batches' are added up, and how ranks' are reduced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nxd_fixture import (
    CONFIG,
    Case,
    batches_of,
    examples,
    gradients_of,
    objective,
    plain,
    require_nxd,
    run_ranks,
    start,
    whole,
)
from oracle import gradients, orpo_loss
from torch import Tensor

from nxdt_align.engines.nxd.settings import Precision

pytestmark = pytest.mark.nxd
LOW = torch.bfloat16
FORMATS = {
    "float32 sums": Precision(LOW, masters=True),
    "float32 reductions": Precision(LOW, masters=True, float32_sums=False),
    "bf16": Precision(LOW, masters=True, float32_sums=False, float32_reductions=False),
    "no masters": Precision(LOW),
}
DATA, TENSOR = Case(dp=2), Case(tp=2, sp=True)
CASES = {"data": DATA, "tensor": TENSOR}


def step(case: Case, formats: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two steps' gradients, each of two micro-batches or more a rank."""
    built = start(case, precision=FORMATS[formats])
    batches = batches_of(built)
    assert len(batches) > 1
    found = []
    for _ in range(2):
        built.step(batches, objective("orpo"))
        found.append(gradients_of(built))
    return found[0], found[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    require_nxd()
    keys = [(case, formats) for case in CASES for formats in FORMATS]
    jobs = [(step, (CASES[case], formats)) for case, formats in keys]
    return dict(zip(keys, run_ranks(2, jobs, tmp_path_factory.mktemp("ranks")), strict=True))


def is_bf16(found: dict[str, Tensor]) -> bool:
    """Whether bf16 holds every value."""
    return all(torch.equal(tensor, tensor.to(LOW).to(tensor.dtype)) for tensor in found.values())


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_right_to_bf16s_rounding(results: Any, case: str, formats: str) -> None:
    """8% of each weight's largest entry, as in test_nxd_parallel; a second step begins anew."""
    model = plain(0)
    wanted = gradients(orpo_loss(model, examples().examples, 0.1), model)
    shards = [{name: t.float() for name, t in rank[0].items()} for rank in results[case, formats]]
    got = whole(CASES[case], CONFIG, shards[:1] if case == "data" else shards, tolerance=0.1)
    for name, tensor in wanted.items():
        assert float((got[name] - tensor).abs().max()) <= 0.08 * float(tensor.abs().max()), name
    for first, second in results[case, formats]:
        for name, tensor in first.items():
            assert tensor.dtype == (LOW if formats == "no masters" else torch.float32)
            assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("case", CASES)
def test_sums_are_in_the_format_asked_for(results: Any, case: str) -> None:
    """fp32_grad_acc: values between those of bf16 come from sums alone, as every gradient that is added up
    is bf16. The other two have such values where ranks with other rows are reduced in float32."""
    for first, _ in results[case, "float32 sums"]:
        assert not is_bf16(first)
    for first, _ in results[case, "bf16"]:
        assert is_bf16(first)
    for first, _ in results[case, "float32 reductions"]:
        # Under sequence parallel those of norms are reduced, over the tensor-parallel ranks.
        summed = {name: t for name, t in first.items() if case == "data" or "norm" in name}
        assert not is_bf16(summed)
        assert is_bf16({name: t for name, t in first.items() if name not in summed})


def test_a_float32_reduction_rounds_to_the_bf16_one(results: Any) -> None:
    """fp32_grads_cc: one addition of two ranks' bf16 sums, to bf16's unit in the last place."""
    pairs = zip(results["data", "float32 reductions"], results["data", "bf16"], strict=True)
    for (exact, _), (rounded, _) in pairs:
        for name, tensor in exact.items():
            assert torch.allclose(tensor, rounded[name], rtol=2**-8, atol=0), name
