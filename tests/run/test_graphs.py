"""``nxdt-align graphs``: what it refuses, and the gate: graphs of every objective and layout have no finding,
and are the same on all ranks. They are of neuronx-distributed's layers where it can be imported, else of our
own stand-ins of them, which test_graph_stand_ins.py compares with the real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graph_runs import (
    LONG,
    RUNS,
    SHORT,
    SMALL,
    TRUE,
    WITHOUT_STAND_INS,
    arguments,
    environment,
    recorder,
    require_torch_xla,
)
from nxd_fixture import require_nxd

from nxdt_align.cli import main
from nxdt_align.config.load import load_config
from nxdt_align.config.schema import Config
from nxdt_align.data.packing import Bucket
from nxdt_align.models.presets import LLAMA3_8B
from nxdt_align.planning.devices import Device
from nxdt_align.planning.graph_cost import Cost, StepCost
from nxdt_align.planning.step_time import RowSeconds
from nxdt_align.run.graphs import _parts_of_step
from nxdt_align.run.tracing_memory import available_bytes, require_memory

THIRDS = (
    *("trainer.devices=3", "distributed_strategy.tensor_model_parallel_size=3", "data.global_batch_size=6"),
    "distributed_strategy.kv_replicator=1",
)
"""Ranks that no number of heads is divided by."""
DEFAULT = ("DPO", "DPO none, flash", "DPO aot", "ORPO", "KTO")
"""Of RUNS, those that are not marked ``full``."""
EVERY_RUN = [
    *(pytest.param(name, id=name) for name in DEFAULT),
    *(pytest.param(name, id=name, marks=pytest.mark.full) for name in RUNS if name not in DEFAULT),
]
Table = Callable[..., dict[str, Any]]
"""(name, rank=0) -> what is recorded of a run of true widths."""


@pytest.fixture(scope="module")
def table_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    require_torch_xla()
    folder = tmp_path_factory.mktemp("graphs")
    with recorder(folder) as record:

        @cache
        def table_of(name: str, rank: int = 0) -> dict[str, Any]:
            if name in WITHOUT_STAND_INS:
                require_nxd()
            (table,) = record([*arguments(folder, TRUE, RUNS[name], LONG), "--ranks", str(rank)])
            return table

        yield table_of


def recorded(given: list[str], *options: str) -> list[dict[str, Any]]:
    """By the command, as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nxdt_align", *given, "--json", *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tables: list[dict[str, Any]] = json.loads(done.stdout)
    return tables


# The gate


def assert_none_found(table: dict[str, Any]) -> None:
    names = {graph["name"] for graph in table["graphs"]}
    assert {"training step", "optimizer"} <= names
    assert [graph["findings"] for graph in table["graphs"]] == [[]] * len(table["graphs"])


@pytest.mark.xla
@pytest.mark.parametrize("name", EVERY_RUN)
def test_no_graph_of_true_widths_has_a_finding(table_of: Table, name: str) -> None:
    table = table_of(name)
    assert_none_found(table)
    names = [graph["name"] for graph in table["graphs"]]
    assert ("validation step" in names) is ("validated" in name)


@pytest.mark.xla
@pytest.mark.parametrize("name", ["DPO", "DPO none, flash", "ORPO"])
def test_sizes_tell_what_graphs_cost(tmp_path: Path, table_of: Table, name: str) -> None:
    """What rows are chosen by, to 10%: true widths, 2 layers; ORPO's run has no sequence parallelism."""
    (step,) = table_of(name)["steps"]
    given = arguments(tmp_path, TRUE, RUNS[name], LONG)
    rows, *bucket = step["shape"]
    of_graph, of_sizes = sum(step["later"].values()), RowSeconds(load_config(given[2], given[5:]), TRUE)
    assert rows * of_sizes(Bucket(*bucket)) == pytest.approx(of_graph, rel=0.1)


@pytest.mark.xla
def test_all_ranks_have_the_same_graphs(table_of: Table) -> None:
    """The first two had others once: their shares start at token 0, and at a number that is a size, too."""
    assert_same_graphs([table_of("DPO", rank) for rank in (0, 1, 31)])


@pytest.mark.xla
@pytest.mark.full
def test_all_ranks_have_the_same_graphs_by_one_command(tmp_path: Path) -> None:
    """An adapter's ranks draw different parts of one mask."""
    require_torch_xla()
    tables = recorded(arguments(tmp_path, SMALL, RUNS["LoRA"], SHORT), "--ranks", "0,1,31")
    assert [table["rank"] for table in tables] == [0, 1, 31]
    assert_same_graphs(tables)


def assert_same_graphs(tables: list[dict[str, Any]]) -> None:
    keys = [[graph["key"] for graph in table["graphs"]] for table in tables]
    assert keys[0] == keys[1] == keys[2] and len(keys[0]) > 3


@pytest.mark.nxd
@pytest.mark.xla
@pytest.mark.full
def test_a_pipelines_stages(tmp_path: Path) -> None:
    """Ranks of a stage have the same graphs; what a stage sends is what the next receives, hidden states of
    (S / tp, B, D) in bf16, by all-gathers over two ranks; the products of both, counted by hand, are those of
    the same model without a pipeline."""
    require_nxd()
    tables = recorded(arguments(tmp_path, SMALL, RUNS["DPO, a pipeline"], SHORT), "--ranks", "0,1,16,17")
    keys = [{graph["key"] for graph in table["graphs"]} for table in tables]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    for table in tables:
        assert_none_found(table)
        sent = {
            collective["shape"]
            for graph in table["graphs"]
            for collective in graph["collectives"]
            if collective["group_size"] == 2 and collective["kind"] == "all-gather"
        }
        rows, tokens = table["steps"][0]["shape"][:2]
        assert sent == {f"bf16[{2 * tokens // 16},{rows},{SMALL.hidden_size}]"}
    whole = (
        *("hf_llama3_8B_DPO_config", "distributed_strategy.tensor_model_parallel_size=16"),
        *("distributed_strategy.kv_replicator=2", "trainer.devices=16"),
    )
    (alone,) = recorded(arguments(tmp_path, SMALL, whole, SHORT))
    steps = [table["steps"][0] for table in (tables[0], tables[2], alone)]
    assert steps[0]["micro_batches"] == steps[2]["micro_batches"] > 2
    assert steps[0]["flops"] + steps[1]["flops"] == steps[2]["flops"]


class Counted(SimpleNamespace):
    """A graph, as far as a step is added up of it."""


def test_what_a_step_runs_for_each_micro_batch() -> None:
    """Of a stage: receive r, forward f, backward b (the first micro-batch's: a), and a sum s, over 3 of the
    micro-batches, in the order of 1F1B. Without a pipeline: a pass of the reference, then one of training."""
    graphs = {key: Counted(key=key) for key in "rfabscq"}
    run = [graphs[key] for key in ["r", "f", "r", "f", "a", "r", "f", "b", "b", "s"]]
    first, later = _parts_of_step(run, 3, 2)  # type: ignore[arg-type]
    assert ["".join(sorted(g.key for g in part)) for part in (first, later)] == ["afrs", "bfr"]
    first, later = _parts_of_step([graphs[key] for key in "qqab"], 2, 1)  # type: ignore[arg-type]
    assert ["".join(g.key for g in part) for part in (first, later)] == ["qa", "qb"]


def test_a_pipeline_waits_while_it_fills() -> None:
    """4 micro-batches over 3 stages: 1F1B takes as long as 4 + 2 of them."""
    one = Cost(products=0.1)
    step = StepCost((1, 8, 4, 2), 4, 8, one, one, Cost(memory=0.01), flops=0, stages=3)
    assert step.cost.seconds == pytest.approx(0.61) and step.waiting.seconds == pytest.approx(0.2)


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ranks", "32"), "--ranks must be from 0 to 31, as the run has 32 processes"),
        (("--lengths", "100,200"), "a prompt and of 2 response(s)"),
        (("--lengths", "3000,2000,1"), "at most data.seq_length (4096), but is 3000,2000,1"),
        (("--lengths", "0,1,1"), "1 or more each"),
        (("distributed_strategy.engine=native", "--ranks", "99"), "--ranks must be from 0 to 31"),
        (
            ("distributed_strategy.engine=native", "distributed_strategy.compile=none"),
            "distributed_strategy.compile must be auto or blocks",
        ),
        (
            ("distributed_strategy.engine=native", "data.attention=flex"),
            "must be auto, dense, causal or nki on a NeuronCore by engine native, but is flex",
        ),
        (
            (
                *("distributed_strategy.engine=native", "model.activations_checkpoint_granularity=selective"),
                "model.activations_checkpoint_recompute=[LlamaMLP]",
            ),
            "graph cannot recompute LlamaMLP by itself",
        ),
        (
            (
                *("distributed_strategy.engine=native", "trainer.accelerator=cuda", "precision.type=fp16"),
                "distributed_strategy.kv_replicator=1",
            ),
            "precision.type: must not be fp16",
        ),
        *(
            (
                (f"distributed_strategy.engine={engine}", *THIRDS),
                "must divide num_key_value_heads (8), or be a multiple of it, but is 3",
            )
            for engine in ("nxd", "native")
        ),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    given = arguments(tmp_path, TRUE, RUNS["DPO"], LONG)
    assert main([*given, *options]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "kib", "words"),
    [
        (
            "nxd",
            2_200_000,
            "32 layers takes up to 2.3 GiB of memory (an estimate), but 2.1 GiB are",
        ),
        ("native", 900_000, "takes up to 1.0 GiB of memory (an estimate), but 878.9 MiB are available"),
    ],
)
def test_a_model_too_large_to_record_here(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    kib: int,
    words: str,
) -> None:
    """1.25 GiB and 32 layers of 6 MiB and 4,096 x 7 KiB on engine nxd."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:  {kib} kB\n")
    monkeypatch.setattr("nxdt_align.run.tracing_memory.MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("nxdt_align.run.graphs.is_importable", lambda name: True)
    options = (f"distributed_strategy.engine={engine}", "distributed_strategy.tensor_model_parallel_size=8")
    given = arguments(tmp_path, LLAMA3_8B, RUNS["DPO"], LONG)
    assert main([*given, *options, "distributed_strategy.kv_replicator=1", "trainer.devices=8"]) == 1
    said = capsys.readouterr().err
    assert words in said and "record on a machine that has more" in said
    assert ("set model.num_layers lower" in said) is (engine == "nxd")


def test_memory_that_no_one_tells_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nxdt_align.run.tracing_memory.MEMINFO", tmp_path / "nowhere")
    assert available_bytes() is None
    require_memory(load_config("hf_llama3_8B_DPO_config"), LLAMA3_8B, "nxd")


@pytest.mark.parametrize("missing", ["torch_xla", "neuronx_distributed"])
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.setattr("nxdt_align.run.graphs.is_importable", lambda name: name != missing)
    assert main(arguments(tmp_path, TRUE, RUNS["DPO"], LONG)) == 1
    said = capsys.readouterr().err
    assert f"error: graphs: {missing} is missing" in said and "\n" not in said.strip().rpartition("error")[2]
    assert "distributed_strategy.engine=native, the engine of trn2 and trn3, is recorded without it" in said


@pytest.mark.parametrize(("stack", "engine"), [("native", "native"), (None, "auto")])
def test_a_machine_of_torch_neurons_records_its_own_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: str | None, engine: str
) -> None:
    seen: list[tuple[Config, Device]] = []

    def reports(config: Config, rank: int, lengths: Any, device: Device) -> tuple[list[Any], list[Any]]:
        seen.append((config, device))
        return [], []

    monkeypatch.setattr("nxdt_align.config.engines.neuron_stack", lambda: stack)
    monkeypatch.setattr("nxdt_align.run.graphs.reports", reports)
    given = [*arguments(tmp_path, TRUE, RUNS["DPO"], LONG), "--json"]
    assert main(given) == 0
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    assert main(given) == 0
    assert [config.distributed_strategy.engine for config, _ in seen] == [engine] * 2
    wanted = ["trn2", "trn2, lnc 1"] if engine == "native" else ["trn1"] * 2
    assert [device.name for _, device in seen] == wanted


def test_data_that_is_missing_is_named_with_what_does_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [each for each in arguments(tmp_path, TRUE, RUNS["DPO"], LONG) if each not in ("--lengths", LONG)]
    assert main(given) == 1
    said = capsys.readouterr().err
    assert "data.train_dir" in said and "--lengths P,N,N" in said
