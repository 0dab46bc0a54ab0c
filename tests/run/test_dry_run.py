"""What a dry run's totals and manifest come to, and what a run says of the manifest; no torch_xla here."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from nxdt_align.engines.base import Graph
from nxdt_align.errors import UserError
from nxdt_align.neuron.compile import CompileError
from nxdt_align.run.dry_run import DryRun, compiling
from nxdt_align.run.mode import RunMode, report_graphs


class Compiler:
    """One that has compiled the graphs of these keys, and failed at others."""

    by_micro_batch = False

    def __init__(self, *keys: str, failed: int = 0, tells_keys: bool = True) -> None:
        self.name = "torch_xla" if tells_keys else "neuronx-cc"
        self._graphs = {key: Graph(key, "training step", ((1, 128, 64, 6),)) for key in keys}
        self._failed, self._tells_keys = failed, tells_keys

    def begin(self, name: str, micro_batches: Any) -> None:
        raise AssertionError("nothing is computed here")

    def begun(self) -> list[tuple[str, Any]]:
        """More than were compiled: this is asked of validation, too, which needs no graph of its own here."""
        shapes = ((1, 128, 64, 6),)
        return [("training step", shapes), ("validation step", shapes)]

    def count(self) -> int:
        return len(self._graphs) + self._failed

    def graphs(self) -> dict[str, Graph] | None:
        return self._graphs if self._tells_keys else None

    def versions(self) -> dict[str, str]:
        return {"torch": "2.9.0", "torch_xla": "2.9.0"}


def test_totals_and_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "compile" / "run_dpo.json"
    with compiling(Compiler("1", "2"), manifest):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "Total graphs: 2",
        "Total successful compilations: 2",
        "Total failed compilations: 0",
    ]
    content = json.loads(manifest.read_text())
    assert [graph["hash"] for graph in content["graphs"]] == ["1", "2"]
    assert content["torch_xla"] == "2.9.0"


def test_a_graph_that_does_not_compile_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The runtime's error becomes a line of the log; a dry run that fails leaves no manifest."""
    with (
        pytest.raises(CompileError, match="1 of 3 graphs did not compile"),
        compiling(Compiler("1", "2", failed=1), tmp_path / "m.json"),
    ):
        raise RuntimeError("INTERNAL: no such instruction")
    assert "Total failed compilations: 1" in capsys.readouterr().out
    assert "INTERNAL: no such instruction" in caplog.text
    assert not (tmp_path / "m.json").exists()


def test_another_error_is_not_the_compilers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="of ours"), compiling(Compiler("1"), tmp_path / "m.json"):
        raise RuntimeError("of ours")
    assert capsys.readouterr().out == ""


def test_no_graph_fails_the_command(tmp_path: Path) -> None:
    with (
        pytest.raises(CompileError, match="found no graph to compile"),
        compiling(Compiler(), tmp_path / "m.json"),
    ):
        pass


def test_a_run_names_graphs_outside_the_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    manifest = tmp_path / "m.json"
    report_graphs(Compiler("1"), manifest)
    assert f"graphs: 1 compiled; COMPILE=1 would list them in {manifest}" in caplog.text
    with compiling(Compiler("1", "2"), manifest):
        pass
    report_graphs(Compiler("1", "7"), manifest)
    assert f"graphs: 2 compiled, 1 outside the manifest {manifest}" in caplog.text
    assert "not in the manifest: graph 7, training step of shapes ((1, 128, 64, 6),)" in caplog.text
    assert "graph 1," not in caplog.text


@pytest.mark.parametrize("tells_keys", [True, False], ids=["hashes", "Neuron"])
@pytest.mark.parametrize("stop", [False, True])
def test_rows_that_were_not_compiled_are_named_before_step_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stop: bool, tells_keys: bool
) -> None:
    manifest, known, other = tmp_path / "m.json", ((1, 128, 64, 6),), ((1, 256, 64, 6),) * 2
    mode, compiler = RunMode(), Compiler("1", tells_keys=tells_keys)

    def check(*planned: tuple[str, Any]) -> None:
        mode.require_compiled(compiler, manifest, lambda: planned, stop=stop)

    check(("training step", other))  # no manifest yet
    with compiling(compiler, manifest):
        pass
    check(("training step", known))
    assert "manifest" not in caplog.text.replace("manifest of the graphs", "")
    with pytest.raises(UserError) if stop else nullcontext() as error:
        check(("training step", known), ("training step", other), ("validation step", known))
    said = str(error.value) if error is not None else caplog.text
    assert f"the manifest {manifest} lacks graphs" in said and "COMPILE=1" in said
    assert "training step of 2 x (1 rows of 256 tokens, 64 response tokens, 6 responses)" in said
    assert "(1 rows of 128" not in said
    DryRun().require_compiled(compiler, manifest, lambda: [("training step", other)], stop=True)
    # A manifest of a CPU's graphs says nothing of Neuron's, nor the other way round.
    elsewhere = Compiler("1", tells_keys=not tells_keys)
    mode.require_compiled(elsewhere, manifest, lambda: [("training step", other)], stop=True)


@pytest.mark.parametrize("compiler", [None, Compiler("1", tells_keys=False)], ids=["no graphs", "Neuron"])
def test_where_this_process_has_no_list_of_graphs(
    compiler: Compiler | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """neuron_parallel_compile prints totals of its own, which ours must not follow; the manifest then lists
    steps alone."""
    caplog.set_level(logging.INFO)
    manifest = tmp_path / "m.json"
    with compiling(compiler, manifest):
        pass
    report_graphs(compiler, manifest)
    assert capsys.readouterr().out == "" and manifest.exists() is (compiler is not None)
    if compiler is not None:
        content = json.loads(manifest.read_text())
        assert content["graphs"] == [] and len(content["steps"]) == 2
    assert ("graphs: 1 compiled or loaded from Neuron's cache" in caplog.text) == (compiler is not None)
