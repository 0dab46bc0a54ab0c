"""Compiling ahead where there is no Neuron: the graphs of a trial run on torch_xla's CPU device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nxdt_align.config.schema import Config
from nxdt_align.engines.base import Engine
from nxdt_align.engines.native import xla
from nxdt_align.neuron.compile import Totals, read_manifest, write_manifest

log = logging.getLogger(__name__)


def manifest_path(experiments: Path, config: Config) -> Path:
    """DPO and ORPO configurations may share a name, so the objective is part of the file's."""
    name = config.exp_manager.name or config.name
    return experiments / "compile" / f"{name}_{config.model_alignment_strategy.objective}.json"


@contextmanager
def compiling(engine: Engine, compilations: Callable[[], int], manifest: Path) -> Iterator[None]:
    """Entered around a trial: prints the totals, and writes the manifest where all graphs were compiled.

    ``compilations``: how many were begun. Raises CompileError where one failed or none was found.
    """
    if not isinstance(engine, xla.XlaEngine) or engine.graphs is None:
        yield
        return
    try:
        yield
    except RuntimeError as error:
        totals = _totals(engine, engine.graphs, compilations())
        if totals.failed == 0:
            raise
        log.error("%s", error)
        print(totals, flush=True)
        totals.require_success("torch_xla")
    totals = _totals(engine, engine.graphs, compilations())
    print(totals, flush=True)
    totals.require_success("torch_xla")
    write_manifest(manifest, engine.graphs.graphs.values(), xla.versions())
    log.info("manifest of the graphs: %s", manifest)


def _totals(engine: xla.XlaEngine, graphs: xla.GraphLog, begun: int) -> Totals:
    engine.note_graphs()
    return Totals(begun, len(graphs.graphs), begun - len(graphs.graphs))


def conclude_run(engine: Engine, manifest: Path) -> None:
    """Say how many graphs were compiled, and which of them no trial run saw."""
    if not isinstance(engine, xla.XlaEngine) or engine.graphs is None:
        return
    engine.note_graphs()
    graphs = engine.graphs.graphs
    known = read_manifest(manifest)
    if known is None:
        log.info("graphs: %d compiled; COMPILE=1 would list them in %s", len(graphs), manifest)
        return
    outside = [graph for key, graph in graphs.items() if key not in known]
    log.info("graphs: %d compiled, %d outside the manifest %s", len(graphs), len(outside), manifest)
    for graph in outside:
        log.warning("not in the manifest: graph %s, %s of shapes %s", graph.key, graph.name, graph.shapes)
