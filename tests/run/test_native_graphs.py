"""``nxdt-align graphs`` on engine native: the ATen operators of each compiled part, and what is found.

Each recording is a process of its own, as there is no way back from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nxdt_align.engines.native.traced import Recorder
from nxdt_align.models.presets import LLAMA3_8B, DecoderConfig
from nxdt_align.planning.aten_report import report
from nxdt_align.planning.devices import DEVICES
from nxdt_align.planning.operators import COLLECTIVES, OPERATORS, status_of

SMALL = replace(
    LLAMA3_8B, vocab_size=512, hidden_size=64, head_dim=8, intermediate_size=128, num_hidden_layers=2
)
TRUE = replace(LLAMA3_8B, num_hidden_layers=2)
PARTS = {"embedding", "layer", "head", "loss"}
DIRECTIONS = {"forward", "backward"}


def recorded(folder: Path, model: DecoderConfig, lengths: str, *overrides: str) -> dict[str, Any]:
    (table,) = of_ranks(folder, model, lengths, *overrides)
    return table


def of_ranks(folder: Path, model: DecoderConfig, lengths: str, *overrides: str) -> list[dict[str, Any]]:
    (folder / "config.json").write_text(json.dumps(model.to_hf_dict()))
    sizes = (f"model.hidden_size={model.hidden_size}", f"model.num_layers={model.num_hidden_layers}")
    run = (
        *("trainer.accelerator=neuron", "trainer.devices=4", "distributed_strategy.engine=native"),
        *("distributed_strategy.kv_replicator=1", "data.global_batch_size=8"),
    )
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "nxdt_align", "graphs", "--json"),
            *("--config-name", "hf_llama3_8B_DPO_config", "--lengths", lengths),
            *(f"model.model_config={folder}/config.json", *sizes, *run, *overrides),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tables: list[dict[str, Any]] = json.loads(done.stdout)
    return tables


def findings(table: dict[str, Any]) -> set[str]:
    return {finding["rule"] for graph in table["graphs"] for finding in graph["findings"]}


def named(table: dict[str, Any], part: str) -> dict[str, Any]:
    (found,) = [graph for graph in table["graphs"] if graph["name"].startswith(part)]
    return dict(found)


@pytest.mark.full
def test_parts_of_a_step_with_a_mask(tmp_path: Path) -> None:
    """Tensor parallel 2 with sequence parallel; one graph per part, however many layers; the products of a
    layer counted by hand: rows of S tokens, D = 64, 4 of 8 heads of 8, F = 128 / 2."""
    model = replace(SMALL, num_attention_heads=8, num_key_value_heads=8)
    table = recorded(
        *(tmp_path, model, "40,20,20", "distributed_strategy.tensor_model_parallel_size=2"),
        *("data.packing=packed", "data.buckets=[256]"),
    )
    names = [graph["name"].partition(" (")[0] for graph in table["graphs"]]
    assert len(names) == len(set(names))
    for part in PARTS:
        assert {f"{part}, {direction}" for direction in DIRECTIONS} <= set(names)
    assert {f"{part}, without gradients" for part in PARTS - {"loss"}} <= set(names)
    assert "masked attention" in findings(table) and "64 bits" not in findings(table)

    layer = named(table, "layer, forward")
    S, D, H, F = 256, 64, 4 * 8, 64
    counted = 2 * S * (4 * D * H + 3 * D * F) + 2 * 2 * S * S * H
    assert sum(product["flops"] for product in layer["products"]) == counted
    assert {c["kind"] for c in layer["collectives"]} == {"all-gather", "reduce-scatter"}
    assert all(c["group_size"] == 2 for c in layer["collectives"])
    (step,) = table["steps"]
    assert step["shape"][1] == 256 and step["seconds"] > 0 and table["device"] == "trn2"


@pytest.mark.full
@pytest.mark.parametrize(
    ("overrides", "absent", "kernel"),
    [
        (("data.packing=none", "data.seq_length=2048"), "masked attention", "traced_flash"),
        (("data.attention=nki",), "masked attention", "traced_intervals"),
        (("data.attention=dense",), "flash kernel", None),
    ],
)
def test_attention_of_true_widths(
    tmp_path: Path, overrides: tuple[str, ...], absent: str, kernel: str | None
) -> None:
    """Of the kernels, the whole of a step's attention stands in the layer as one operator each way."""
    limit = "model_alignment_strategy.dpo.max_prompt_length=1024"
    table = recorded(
        *(tmp_path, TRUE, "1024,992,992", limit, "distributed_strategy.tensor_model_parallel_size=4"),
        *overrides,
    )
    assert absent not in findings(table)
    layer, back = named(table, "layer, forward"), named(table, "layer, backward")
    if kernel is None:
        assert "masked attention" in findings(table)
    else:
        assert layer["kinds"][kernel] == 1 and back["kinds"][f"{kernel}_backward"] == 1
    assert "float32 products" not in findings(table)


@pytest.mark.full
def test_a_pipelines_parts_are_those_of_one_stage(tmp_path: Path) -> None:
    alone = "distributed_strategy.tensor_model_parallel_size=1"
    whole = recorded(tmp_path, SMALL, "40,20,20", alone)
    staged = recorded(
        *(tmp_path, SMALL, "40,20,20", alone, "distributed_strategy.pipeline_model_parallel_size=2")
    )
    assert {g["key"] for g in whole["graphs"]} == {g["key"] for g in staged["graphs"]}
    (step,), (of_stage,) = whole["steps"], staged["steps"]
    # Of two stages the second has one of the layers, and the head.
    whole_flops, of_one = (each["flops"] / each["micro_batches"] for each in (step, of_stage))
    assert of_stage["stages"] == 2 and 0 < of_one < whole_flops


@pytest.mark.full
def test_adapters_leave_the_base_without_weight_gradients(tmp_path: Path) -> None:
    """One product per frozen weight in the backward pass, of its input's gradient, and none in the layer's
    first, whose input is the frozen embedding's; counted by hand for layer 2: D = 64, F = 128, 8 heads of 8,
    2 of keys and values, rank 8 on q_proj alone, rows of S tokens."""
    lora = [
        f"model_alignment_strategy.peft.{each}"
        for each in ("target_modules=[q_proj]", "lora_rank=8", "lora_dropout=0")
    ]
    model = replace(SMALL, num_attention_heads=8, num_key_value_heads=2)
    table = recorded(
        *(tmp_path, model, "40,20,20", "data.packing=packed", "data.buckets=[256]"),
        *(
            "distributed_strategy.tensor_model_parallel_size=1",
            "model.activations_checkpoint_granularity=null",
        ),
        *lora,
    )
    S, D, K, F, r = 256, 64, 2 * 8, 128, 8
    weights = 2 * D * D + 2 * D * K + 3 * D * F
    scores, factors = 4 * S * S * D, 2 * S * r * (D + D)
    layers = [g for g in table["graphs"] if g["name"].startswith("layer, backward")]
    flops = sorted(sum(product["flops"] for product in layer["products"]) for layer in layers)
    assert flops[-1] == 2 * S * weights + 2 * scores + 2 * factors
    assert len(flops) == 2 and flops[0] < flops[1]
    assert any(g["name"].startswith("embedding, without gradients") for g in table["graphs"])


@pytest.mark.full
def test_each_bucket_and_validation_are_recorded(tmp_path: Path) -> None:
    """8 pairs of 80 tokens in rows of 128, whose step costs what it does where there are no others; and a
    step of one pair in rows of 256."""
    table = recorded(
        *(tmp_path, SMALL, "40,20,20", "data.packing=packed", "data.buckets=[128,256]"),
        *("data.val_dir=/nowhere.jsonl", "trainer.limit_val_batches=1.0"),
        *("distributed_strategy.tensor_model_parallel_size=1", "data.attention=dense"),
    )
    steps = {step["shape"][1]: step for step in table["steps"]}
    assert steps.keys() == {128, 256} and [steps[n]["examples"] for n in (128, 256)] == [8, 1]
    for tokens in steps:
        names = {g["name"] for g in table["graphs"] if g["shapes"][0][1] == tokens}
        assert "loss, without gradients (first in: validation step)" in names
        assert {f"{part}, backward (first in: training step)" for part in PARTS} <= names

    (alone,) = recorded(
        *(tmp_path, SMALL, "40,20,20", "data.packing=packed", "data.buckets=[128]"),
        *("distributed_strategy.tensor_model_parallel_size=1", "data.attention=dense"),
    )["steps"]
    assert alone == steps[128]


@pytest.mark.full
def test_ranks_differ_in_the_numbers_of_their_shares_alone(tmp_path: Path) -> None:
    """Of tensor parallel ranks: the first token of the embedding's share, and which part of a gathered
    gradient is a rank's. Rank 2 is rank 0 of another replica, recorded by another process."""
    tables = of_ranks(
        *(tmp_path, replace(SMALL, num_attention_heads=8, num_key_value_heads=8), "40,20,20"),
        *("--ranks", "0,1,2", "distributed_strategy.tensor_model_parallel_size=2"),
        *("data.packing=packed", "data.buckets=[256]"),
    )
    first, second, again = (
        {graph["name"].partition(" (")[0]: graph["key"] for graph in table["graphs"]} for table in tables
    )
    assert first == again and first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {
        *("embedding, forward", "embedding, without gradients", "head, backward")
    }


def test_numbers_belong_to_a_graphs_key() -> None:
    def key(first: int, dtype: torch.dtype) -> str:
        recorder = Recorder()
        module = make_fx(lambda x: (x - first).to(dtype).split(2)[first])(torch.zeros(4))
        recorder._record("embedding", "forward", module)
        return recorder.traced[0].key

    assert key(0, torch.float64) == key(0, torch.float64)
    assert len({key(first, dtype) for first in (0, 1) for dtype in (torch.float64, torch.int64)}) == 4


# What is found, on graphs written by hand


class Op:
    is_strided = False
    ranks = ()

    def __init__(self, target: str, results: Any, operands: Any = (), **more: Any) -> None:
        self.target, self.results, self.operands = target, results, operands
        self.__dict__.update(more)


ROWS = ("bfloat16", (1, 8, 500, 64))


class GraphOf:
    key, name, shapes, inputs, outputs, executions = "0", "layer", [[1, 512, 64, 2]], (), (), {}

    def __init__(self, *ops: Op) -> None:
        self.ops = ops


@pytest.mark.parametrize(
    ("op", "rule", "words"),
    [
        (
            Op("aten._softmax.default", [("float32", (1, 8, 512, 512))]),
            "masked attention",
            "f32[1,8,512,512]",
        ),
        (
            Op("nxdt_align.traced_flash.default", [ROWS], [ROWS] * 3),
            "flash kernel",
            "is given bf16[1,8,500,64]",
        ),
        (Op("aten.arange.default", [("int64", (512,))]), "64 bits", "s64[512]"),
        (Op("aten.nonzero.default", [("int32", (3, 1))]), "data-dependent", "aten.nonzero.default"),
        (Op("aten._scaled_mm.default", [("bfloat16", (3, 1))]), "fallback", "_scaled_mm"),
        (Op("aten.cumsum.default", [("float32", (3,))]), "unknown", "aten.cumsum.default"),
        (
            Op("aten.native_dropout_backward.default", [("bfloat16", (3, 1))]),
            "fallback",
            "native_dropout_backward",
        ),
        (Op("mine.kernel.default", [("float32", (3,))]), "unknown", "mine.kernel.default"),
        (
            Op("aten.slice.Tensor", [("bfloat16", (512, 256))], [("bfloat16", (512, 512))], is_strided=True),
            "strided slices",
            "of bf16[512,512]",
        ),
        (
            Op("aten.mm.default", [("float32", (8, 8))], [("float32", (8, 8))] * 2),
            "float32 products",
            "100% of the multiplications",
        ),
    ],
)  # fmt: skip
def test_findings(op: Op, rule: str, words: str) -> None:
    found = report(GraphOf(op), DEVICES["trn2"], low_precision=True)  # type: ignore[arg-type]
    assert [finding.rule for finding in found.findings] == [rule]
    assert words in found.findings[0].what


@pytest.mark.parametrize(("heads", "cores", "times"), [(8, 2, 1), (7, 2, 2), (7, 1, 1)])
def test_a_core_that_waits_for_another_is_priced(heads: int, cores: int, times: int) -> None:
    """In nki-library's backward pass, where the query heads of one key-value head are not shared evenly."""
    q, k = ("bfloat16", (1, 4096, heads, 128)), ("bfloat16", (1, 4096, 1, 128))
    op = Op("nxdt_align.traced_intervals_backward.default", [q, k, k], [q, k, k, q, q])
    device = replace(DEVICES["trn2"], physical_cores=cores)
    found = report(GraphOf(op), device, low_precision=True)  # type: ignore[arg-type]
    products = 5 * 2 * 4096**2 * heads * 128
    assert found.cost.seconds == pytest.approx(times * products / device.flops)


def test_what_is_known_of_operators_has_one_place() -> None:
    assert status_of("aten.mm.default") == "lowered" and status_of("aten.where.self") == "unknown"
    assert all(status_of(f"_c10d_functional.{name}.default") == "lowered" for name in COLLECTIVES)
    missing = [name for name in OPERATORS if not hasattr(torch.ops.aten, name)]
    assert not missing
