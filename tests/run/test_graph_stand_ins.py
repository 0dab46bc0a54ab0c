"""Our own stand-ins of neuronx-distributed's layers, of which test_graphs.py records graphs where its source
is missing: they are the same, and what is wrong in a layer is found."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from graph_runs import (
    LONG,
    RUNS,
    SHORT,
    SMALL,
    STAND_INS,
    TRUE,
    WITHOUT_STAND_INS,
    Recorder,
    arguments,
    recorder,
    require_torch_xla,
)
from nxd_fixture import require_nxd

pytestmark = pytest.mark.xla
COMPARED = ("DPO", "ORPO", "KTO", "LoRA", "data parallel")
"""Of RUNS, those that are not marked ``full``: with and without sequence parallelism, masters and ZeRO-1; kv
heads' weights apart and as one, with copies and without; more than one data-parallel rank; frozen weights."""
COMPARABLE = [
    *(pytest.param(name, id=name) for name in COMPARED),
    *(
        pytest.param(name, id=name, marks=pytest.mark.full)
        for name in RUNS
        if name not in (*COMPARED, *WITHOUT_STAND_INS)
    ),
]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    require_torch_xla()
    with recorder(tmp_path_factory.mktemp("graphs")) as record:
        yield record


@pytest.mark.nxd
@pytest.mark.parametrize("name", COMPARABLE)
def test_graphs_are_those_of_the_real_source(tmp_path: Path, record: Recorder, name: str) -> None:
    """To the hash: the same instructions in the same order. What is compared before says what differs."""
    require_nxd()
    given = arguments(tmp_path, TRUE, RUNS[name], LONG)
    (real,), (ours,) = record(given), record(given, STAND_INS)
    assert [graph["name"] for graph in ours["graphs"]] == [graph["name"] for graph in real["graphs"]]
    for one, other in zip(ours["graphs"], real["graphs"], strict=True):
        for part in ("products", "collectives", "slices", "kinds", "findings", "key"):
            assert one[part] == other[part], (one["name"], part)
    assert ours["steps"] == real["steps"]


def test_a_pipeline_is_refused(tmp_path: Path, record: Recorder) -> None:
    with pytest.raises(AssertionError, match="stand-ins of neuronx_distributed have no pipeline"):
        record(arguments(tmp_path, SMALL, RUNS[WITHOUT_STAND_INS[0]], SHORT), STAND_INS)


FAULTS = {
    "parallel_layers/layers.py": {
        # Each entry of the embedding's rows by itself.
        "rows = F.embedding(((input_ - self.start_index) * is_here.long()).long(), self.weight)": (
            "index = ((input_ - self.start_index) * is_here.long()).flatten()[:, None]; "
            "rows = self.weight.gather(0, index.expand(-1, self.weight.shape[1])).view(*input_.shape, -1)"
        ),
        # bf16 operands, multiplied in float32.
        'return torch.einsum("...m,mn->...n", _whole(x, ranks, scattered), weight.t())': (
            "return _whole(x, ranks, scattered).float().matmul(weight.t().float()).to(x.dtype)"
        ),
    },
    "modules/qkv_linear.py": {
        # A reduction of integers.
        "copied = [grad.to(reduce_dtype) for grad in (k, v)]": "copied = [grad.int() for grad in (k, v)]",
    },
}


def test_what_is_wrong_in_a_layer_is_found(tmp_path: Path, record: Recorder) -> None:
    """Faults that are planted in a copy of the stand-ins are found by the gate's own way of recording."""
    copy = tmp_path / "planted"
    shutil.copytree(STAND_INS, copy)
    for file, lines in FAULTS.items():
        path = copy / "neuronx_distributed" / file
        text = path.read_text()
        for right, wrong in lines.items():
            assert text.count(right) == 1, right
            text = text.replace(right, wrong)
        path.write_text(text)
    (table,) = record(arguments(tmp_path, SMALL, RUNS["ORPO"], SHORT), copy)
    rules = {finding["rule"] for graph in table["graphs"] for finding in graph["findings"]}
    assert rules == {"single elements", "float32 products", "integer collectives"}
