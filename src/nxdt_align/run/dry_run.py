"""``COMPILE=1`` and other dry runs: every graph of the run in a few steps that write nothing.

Under neuron_parallel_compile, graphs are extracted and never executed, so every value is zero: nothing here
may branch on one. Steps that torch.compile compiles (``distributed_strategy.compile``) fill its backend's
cache on disk. Where there is neither, the graphs are compiled on torch_xla's CPU device. Both list them in a
manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.tokenize import Tokenization
from nxdt_align.engines import xla
from nxdt_align.engines.base import Compiler, Engine, Shapes
from nxdt_align.engines.ranks import Ranks
from nxdt_align.messages import NOTICE, RunLog
from nxdt_align.neuron.compile import Graph, Totals, write_manifest
from nxdt_align.reference.cache import ReferenceStore
from nxdt_align.reference.precompute import trace_shapes
from nxdt_align.run.contracts import Checkpoints, Result, RunEnv
from nxdt_align.run.mode import RunMode, graphs_of_all
from nxdt_align.run.places import Places
from nxdt_align.run.resume import RunFolder, RunIdentity
from nxdt_align.stop_signals import StopSignals
from nxdt_align.training.hooks import Preflight

log = logging.getLogger(__name__)


class _PreflightGraphs(Preflight):
    """Runs the preflight's graphs and ignores its values, which are zeros."""

    def judge(self, worst: float) -> None:
        pass


class DryRun(RunMode):
    """A few steps that cover each static shape of the run; nothing is resumed, and no cache, log, checkpoint
    or export is written."""

    compute_reference = staticmethod(trace_shapes)
    preflight = _PreflightGraphs
    checks_values = False
    makes_samples = False
    finishes_steps = False

    def check_places(self, places: Places) -> None:
        """Nothing is written, so no folder has to be writable."""

    def check_experiment(self, config: Config) -> None:
        """Nothing is logged."""

    def fallback_device(self, config: Config, env: RunEnv) -> torch.device:
        """The CPU where torch.compile compiles for it; else torch_xla's CPU device if it can compile this
        run's graphs, else the CPU again."""
        if config.distributed_strategy.compile == "blocks":
            return torch.device("cpu")
        if not xla.is_available():
            why = "torch_xla is not installed"
        elif env.world_size > 1:
            why = "torch_xla's CPU device runs one process"
        elif config.data.attention == "blocks":
            why = "data.attention: blocks has no static shapes"
        elif config.data.attention not in ("auto", "dense", "causal"):
            why = f"data.attention: {config.data.attention} is not for torch_xla's CPU device"
        elif config.precision.type == "fp16":
            why = "precision.type: fp16 is not in the engine's compiled graphs"
        else:
            return xla.device()
        self.note_no_graphs(why)
        return torch.device("cpu")

    def note_no_graphs(self, why: str, but: str = "nothing is compiled ahead") -> None:
        log.log(NOTICE, "COMPILE=1: %s, so the dry-run steps run but %s", why, but)

    def token_cache(self, places: Places) -> Path | None:
        return None

    def fixes_micro_batches(self, device: torch.device) -> bool:
        return True

    def prepare(self, data: ModelAlignmentDataModule, steps: int) -> None:
        data.start_dry_run(steps)

    def extent(self, config: Config) -> dict[str, Any]:
        """The dry-run steps form one epoch; validation runs once, after it."""
        whole = {"limit_train_batches": 1.0, "limit_val_batches": 1.0, "val_check_interval": 1.0}
        return whole | {"max_epochs": 1, "check_val_every_n_epoch": 1, "num_sanity_val_steps": 0}

    def find_run(
        self, config: Config, places: Places, identity: RunIdentity, checkpoints: Checkpoints, engine: Engine
    ) -> AbstractContextManager[RunFolder]:
        return nullcontext(RunFolder(places.experiments, None))

    def resume_point(
        self, config: Config, run: RunFolder, checkpoints: Checkpoints, start: object, engine: Engine
    ) -> Path | None:
        """None: a resumed run uses the same graphs, so a dry run need not resume."""
        return None

    def say_what_is_kept(
        self, signals: StopSignals | None, checkpoint: Path | None, keeps_reference: bool
    ) -> None:
        if signals is not None:
            signals.situation = "the dry run stopped; it writes nothing"

    def reference_store(
        self, folder: Path, fingerprint: str, width: int, made_from: Mapping[str, str]
    ) -> ReferenceStore:
        return ReferenceStore(
            folder, fingerprint, width=width, description=made_from, read_only=True, ignore_adds=True
        )

    def require_compiled(
        self,
        compiler: Compiler | None,
        manifest: Path,
        planned: Callable[[], Iterable[tuple[str, Shapes]]],
        *,
        stop: bool,
    ) -> None:
        """Nothing: this compiles them."""

    def ahead(self, compiler: Compiler, manifest: Path) -> None:
        """What an earlier dry run listed does not bind this one."""

    def monitors(self, config: Config, env: RunEnv) -> list[Callback]:
        return []

    def profilers(self, config: Config, env: RunEnv, run: RunFolder, device: torch.device) -> list[Callback]:
        return []

    def export_folder(self, config: Config, run: RunFolder) -> Path | None:
        return None

    def keep_log(self, run_log: RunLog, run: RunFolder) -> None:
        """Nothing is written."""

    def start_experiment(
        self, trainer: Trainer, config: Config, run: RunFolder, identity: RunIdentity, step: int | None
    ) -> None:
        """No folder, logger or checkpoint callback."""

    def keep_companions(
        self, run: RunFolder, tokenization: Tokenization, generation: Mapping[str, Any]
    ) -> None:
        """Nothing is written."""

    def around_fit(self, compiler: Compiler | None, manifest: Path) -> AbstractContextManager[None]:
        return compiling(compiler, manifest)

    def report(self, config: Config, run: RunFolder) -> None:
        """Nothing was logged."""

    def conclude(self, compiler: Compiler | None, manifest: Path, result: Result, samples: int) -> None:
        log.log(NOTICE, "dry run done: %d steps, nothing was written", result.step)


@contextmanager
def compiling(compiler: Compiler | None, manifest: Path) -> Iterator[None]:
    """Wraps a dry run: prints the totals, and writes the manifest if every graph was compiled.

    Where neuron_parallel_compile reports, the manifest lists the steps alone, and the totals are its. Does
    nothing where nothing is compiled. Collective. Raises CompileError where a compilation failed or there
    was none.
    """
    if compiler is None:
        yield
        return
    if compiler.graphs() is None:
        yield
        # Every rank takes the same steps; and Neuron's default group gathers no plain values.
        _list(compiler, manifest, [], [compiler.begun()])
        return
    try:
        yield
    # torch_xla raises a bare RuntimeError for a graph that does not compile, torch.compile one of its own;
    # anything else also lands here, and is re-raised where no compilation failed.
    except RuntimeError as error:
        begun, compiled = compiler.count(), len(compiler.graphs() or ())
        if begun == compiled:
            raise
        log.error("%s", error)
        totals = Totals(begun, compiled, begun - compiled)
        print(totals, flush=True)
        totals.require_success(compiler.name)
    graphs = graphs_of_all(compiler) or {}
    totals = Totals(len(graphs), len(graphs), 0)
    if Ranks().rank == 0:
        print(totals, flush=True)
    totals.require_success(compiler.name)
    _list(compiler, manifest, graphs.values(), Ranks().gather(compiler.begun()))


def _list(
    compiler: Compiler, manifest: Path, graphs: Iterable[Graph], steps: Iterable[Iterable[tuple[str, Shapes]]]
) -> None:
    """Write the manifest: these graphs, and the steps of each rank."""
    if Ranks().rank == 0:
        taken = dict.fromkeys(step for of_rank in steps for step in of_rank)
        versions = compiler.versions()
        write_manifest(manifest, graphs, versions, taken, compiler=compiler.name)
    log.log(NOTICE, "manifest of the graphs: %s", manifest)
