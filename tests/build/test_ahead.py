"""What a trial run's totals and manifest come to, and what a run says of the manifest; no torch_xla here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nxdt_align.build.ahead import compiling, conclude_run
from nxdt_align.engines.native import xla
from nxdt_align.neuron.compile import CompileError


class Engine(xla.XlaEngine):
    """An engine that has nothing but a log of graphs."""

    def __init__(self, *keys: str) -> None:
        graphs = {key: xla.Graph(key, "training step", ((1, 128, 64, 6),)) for key in keys}
        self.graphs: Any = SimpleNamespace(graphs=graphs, note=lambda name, shapes: None)


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "versions", lambda: {"torch": "2.9.0", "torch_xla": "2.9.0"})


def test_totals_and_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "compile" / "run_dpo.json"
    with compiling(Engine("1", "2"), lambda: 2, manifest):
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
    """The runtime's error becomes a line of the log; a trial that fails leaves no manifest."""
    with (
        pytest.raises(CompileError, match="1 of 3 graphs did not compile"),
        compiling(Engine("1", "2"), lambda: 3, tmp_path / "m.json"),
    ):
        raise RuntimeError("INTERNAL: no such instruction")
    assert "Total failed compilations: 1" in capsys.readouterr().out
    assert "INTERNAL: no such instruction" in caplog.text
    assert not (tmp_path / "m.json").exists()


def test_another_error_is_not_the_compilers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="of ours"), compiling(Engine("1"), lambda: 1, tmp_path / "m.json"):
        raise RuntimeError("of ours")
    assert capsys.readouterr().out == ""


def test_no_graph_fails_the_command(tmp_path: Path) -> None:
    with (
        pytest.raises(CompileError, match="found no graph to compile"),
        compiling(Engine(), lambda: 0, tmp_path / "m.json"),
    ):
        pass


def test_a_run_names_graphs_outside_the_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    manifest = tmp_path / "m.json"
    conclude_run(Engine("1"), manifest)
    assert f"graphs: 1 compiled; COMPILE=1 would list them in {manifest}" in caplog.text
    with compiling(Engine("1", "2"), lambda: 2, manifest):
        pass
    conclude_run(Engine("1", "7"), manifest)
    assert f"graphs: 2 compiled, 1 outside the manifest {manifest}" in caplog.text
    assert "not in the manifest: graph 7, training step of shapes ((1, 128, 64, 6),)" in caplog.text
    assert "graph 1," not in caplog.text
