"""Compiling ahead where there is no Neuron: the graphs of a trial run on torch_xla's CPU device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nxdt_align.config.schema import Config
from nxdt_align.engines.base import Compiler, Graph
from nxdt_align.neuron.compile import Totals, read_manifest, write_manifest

log = logging.getLogger(__name__)


def manifest_path(experiments: Path, config: Config) -> Path:
    """DPO and ORPO configurations may share a name, so the objective is part of the file's."""
    name = config.exp_manager.name or config.name
    return experiments / "compile" / f"{name}_{config.model_alignment_strategy.objective}.json"


@contextmanager
def compiling(compiler: Compiler | None, manifest: Path) -> Iterator[None]:
    """Entered around a trial: prints the totals, and writes the manifest where all graphs were compiled.

    On Neuron, where neuron_parallel_compile does so, and where nothing is compiled, nothing happens here.
    Raises CompileError where a compilation failed or there was none.
    """
    if compiler is None or compiler.graphs() is None:
        yield
        return
    try:
        yield
    except RuntimeError as error:
        totals = _totals(compiler)
        if totals.failed == 0:
            raise
        log.error("%s", error)
        print(totals, flush=True)
        totals.require_success("torch_xla")
    totals = _totals(compiler)
    print(totals, flush=True)
    totals.require_success("torch_xla")
    write_manifest(manifest, _graphs(compiler).values(), compiler.versions())
    log.info("manifest of the graphs: %s", manifest)


def _graphs(compiler: Compiler) -> Mapping[str, Graph]:
    return compiler.graphs() or {}


def _totals(compiler: Compiler) -> Totals:
    begun, compiled = compiler.count(), len(_graphs(compiler))
    return Totals(begun, compiled, begun - compiled)


def conclude_run(compiler: Compiler | None, manifest: Path) -> None:
    """Say how many graphs were compiled, and which of them no trial run saw."""
    if compiler is None:
        return
    graphs = compiler.graphs()
    if graphs is None:
        log.info("graphs: %d compiled or taken from Neuron's cache", compiler.count())
        return
    known = read_manifest(manifest)
    if known is None:
        log.info("graphs: %d compiled; COMPILE=1 would list them in %s", len(graphs), manifest)
        return
    outside = [graph for key, graph in graphs.items() if key not in known]
    log.info("graphs: %d compiled, %d outside the manifest %s", len(graphs), len(outside), manifest)
    for graph in outside:
        log.warning("not in the manifest: graph %s, %s of shapes %s", graph.key, graph.name, graph.shapes)
