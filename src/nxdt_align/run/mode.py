"""What a run does besides its steps. A dry run (``dry_run.py``) overrides only these methods."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer

from nxdt_align.config.load import to_yaml
from nxdt_align.config.schema import Config
from nxdt_align.config.start import EXPORT, REPORT_FILE, SETTINGS_FILE
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.tokenize import Tokenization
from nxdt_align.engines.base import Compiler, Engine, Graph, Shapes
from nxdt_align.engines.ranks import Ranks
from nxdt_align.errors import UserError
from nxdt_align.evaluation.settings import flat
from nxdt_align.files import atomic_write, explain
from nxdt_align.messages import NOTICE, RunLog
from nxdt_align.neuron.compile import read_manifest, read_steps
from nxdt_align.neuron.monitor import NeuronMonitor
from nxdt_align.reference.cache import ReferenceStore
from nxdt_align.reference.parts import FloatArray
from nxdt_align.reference.precompute import PassSummary, precompute
from nxdt_align.run.contracts import Checkpoints, Result, RunEnv
from nxdt_align.run.locate import keep_companions
from nxdt_align.run.places import Places
from nxdt_align.run.resume import RunFolder, RunIdentity, resume_point, write_identity
from nxdt_align.run.search import find
from nxdt_align.stop_signals import StopSignals
from nxdt_align.training.experiment import start_experiment
from nxdt_align.training.experiment_check import check_experiment
from nxdt_align.training.hooks import Preflight
from nxdt_align.training.monitors import DeviceMonitor
from nxdt_align.training.profile import ProfileSteps
from nxdt_align.training.texts import write_settings

log = logging.getLogger(__name__)


class RunMode:
    """A training run, which writes caches, logs, checkpoints and the export."""

    compute_reference: Callable[..., tuple[FloatArray, PassSummary]] = staticmethod(precompute)
    """Computes a split's table of reference values, see ``reference.precompute``."""
    preflight: type[Preflight] = Preflight
    checks_values: bool = True
    """Whether values that are not finite stop the run."""
    makes_samples: bool = True
    """Whether the policy answers prompts during evaluation, where the configuration says so."""
    finishes_steps: bool = True
    """Whether a signal waits for the end of the step, which is then saved."""

    def check_places(self, places: Places) -> None:
        """Raise UserError if the run could not write to one of its folders."""
        places.require_writable()

    def check_experiment(self, config: Config) -> None:
        """Raise UserError if loggers and checkpoint callback could not be made."""
        check_experiment(config.exp_manager)

    def fallback_device(self, config: Config, env: RunEnv) -> torch.device:
        """The device if ``trainer.accelerator: auto`` finds no accelerator."""
        return torch.device("cpu")

    def note_no_graphs(self, why: str, but: str = "nothing is compiled ahead") -> None:
        """Report ``why`` no graph is compiled ahead, and what a dry run's steps do instead; only it does."""

    # Data and steps

    def token_cache(self, places: Places) -> Path | None:
        return places.tokens

    def fixes_micro_batches(self, device: torch.device) -> bool:
        """Whether every step of a bucket has the same number of micro-batches, as compiled steps need."""
        return device.type == "xla"

    def prepare(self, data: ModelAlignmentDataModule, steps: int) -> None:
        """Choose what ``data`` yields in a run of ``steps`` optimizer steps (-1: not limited by steps)."""

    def extent(self, config: Config) -> dict[str, Any]:
        """Lengths and validation intervals, as arguments of Lightning's Trainer."""
        names = ("max_steps", "max_epochs", "max_time")
        limits = ("num_sanity_val_steps", "limit_val_batches", "limit_train_batches")
        interval, epochs = config.validation_interval
        return {
            **{name: getattr(config.trainer, name) for name in (*names, *limits)},
            "val_check_interval": interval,
            "check_val_every_n_epoch": epochs,
        }

    # Resuming

    def find_run(
        self, config: Config, places: Places, identity: RunIdentity, checkpoints: Checkpoints, engine: Engine
    ) -> AbstractContextManager[RunFolder]:
        return find(config, places, identity, checkpoints, engine)

    def resume_point(
        self, config: Config, run: RunFolder, checkpoints: Checkpoints, start: object, engine: Engine
    ) -> Path | None:
        return resume_point(config, run, checkpoints, start, engine)

    def say_what_is_kept(
        self, signals: StopSignals | None, checkpoint: Path | None, keeps_reference: bool
    ) -> None:
        """What a signal before the first step would find: ``checkpoint`` is the run's own."""
        if signals is None:
            return
        said = "stopped before the first step: there is nothing to save yet"
        if checkpoint is not None:
            said = f"stopped before the first step after that of {checkpoint}, from which the run resumes"
        signals.situation = said + (", and finished reference values are kept" if keeps_reference else "")

    # Graphs

    def require_compiled(
        self,
        compiler: Compiler | None,
        manifest: Path,
        planned: Callable[[], Iterable[tuple[str, Shapes]]],
        *,
        stop: bool,
    ) -> None:
        """Say before the first step which of its shapes the run would compile in its midst.

        Args:
            planned: names of graphs and the shapes of their steps' micro-batches; called where it is needed.
            stop: raise UserError instead.
        """
        taken = None if compiler is None else read_steps(manifest, compiler.name)
        if taken is None:
            return
        assert compiler is not None
        wanted = planned()
        if compiler.by_micro_batch:
            wanted = dict.fromkeys((name, (shape,)) for name, shapes in wanted for shape in shapes)
        missing = [f"{name} of {_in_words(shapes)}" for name, shapes in wanted if (name, shapes) not in taken]
        if not missing:
            return
        message = (
            f"the manifest {manifest} lacks graphs of this run's rows, which would be compiled in its midst: "
            f"{', '.join(missing)}. COMPILE=1 with the same overrides compiles them ahead"
        )
        if stop:
            raise UserError(f"exp_manager.fail_on_recompile: {message}")
        log.warning("%s", message)

    def ahead(self, compiler: Compiler, manifest: Path) -> Collection[str] | None:
        """Keys of the graphs that were compiled ahead; None where that is not known."""
        return read_manifest(manifest, compiler.name) or None

    # Output

    def reference_store(
        self, folder: Path, fingerprint: str, width: int, made_from: Mapping[str, str]
    ) -> ReferenceStore:
        return ReferenceStore(folder, fingerprint, width=width, description=made_from)

    def monitors(self, config: Config, env: RunEnv) -> list[Callback]:
        """neuron-monitor observes the whole node, so one process per node starts it."""
        if env.local_rank != 0:
            return []
        return [DeviceMonitor(NeuronMonitor(), config.trainer.log_every_n_steps)]

    def profilers(self, config: Config, env: RunEnv, run: RunFolder, device: torch.device) -> list[Callback]:
        """What writes traces of steps into the run's folder."""
        settings = config.trainer.profiler
        if settings is None or (env.rank != 0 and not settings.all_ranks):
            return []
        return [ProfileSteps(settings, run.path, env.rank, device)]

    def export_folder(self, config: Config, run: RunFolder) -> Path | None:
        """Destination of the final export; None for no export."""
        return run.path / EXPORT if config.exp_manager.export_hf else None

    def keep_log(self, run_log: RunLog, run: RunFolder) -> None:
        """Write what the run says to a file."""
        run_log.write_to(run.path)

    def start_experiment(
        self, trainer: Trainer, config: Config, run: RunFolder, identity: RunIdentity, step: int | None
    ) -> None:
        """Set up folder, loggers and checkpoint callback; ``step``: of the run's own checkpoint, if any."""
        name = config.exp_manager.name or config.name
        start_experiment(trainer, config.exp_manager, name, run.path, resumed_step=step)
        if trainer.is_global_zero:
            text = to_yaml(config)
            write_identity(run.path, identity.digest, identity.parts)
            atomic_write(run.path / SETTINGS_FILE, text.encode())
            settings = flat(yaml.safe_load(text))
            given = {key: value for key, value in settings.items() if key in config.given}
            write_settings(trainer.loggers, settings, given, text)

    def keep_companions(
        self, run: RunFolder, tokenization: Tokenization, generation: Mapping[str, Any]
    ) -> None:
        """Write what an export of one of the run's checkpoints needs beside it; called on rank 0."""
        keep_companions(run.path, tokenization.tokenizer, generation)

    def around_fit(self, compiler: Compiler | None, manifest: Path) -> AbstractContextManager[None]:
        """A context around all steps."""
        return nullcontext()

    def conclude(self, compiler: Compiler | None, manifest: Path, result: Result, samples: int) -> None:
        """Log the number of compiled graphs, those that no dry run compiled, and the output folders."""
        report_graphs(compiler, manifest)
        log.log(NOTICE, "done: %d steps, %d samples", result.step, samples)
        log.log(NOTICE, "experiment folder: %s", result.folder)
        if result.export is not None:
            log.log(NOTICE, "Hugging Face export: %s", result.export)

    def report(self, config: Config, run: RunFolder) -> None:
        """Write the run's report; called on rank 0. What it fails at does not fail the run."""
        if not config.exp_manager.report:
            return
        # Drawing needs matplotlib, which only a run that ends has to import.
        from nxdt_align.evaluation.report import write_reports

        try:
            verdict = write_reports([run.path], run.path / REPORT_FILE)[0]
        except OSError as error:
            log.warning("the report of %s cannot be written: %s", run.path, explain(error))
            return
        log.log(NOTICE, "verdict: %s", verdict.summary)
        log.log(NOTICE, "report: %s", run.path / REPORT_FILE)


def _in_words(shapes: Shapes) -> str:
    """Of a step's micro-batches, which are alike."""
    rows, tokens, responses, slots = shapes[0]
    return f"{len(shapes)} x ({rows} rows of {tokens} tokens, {responses} response tokens, {slots} responses)"


def graphs_of_all(compiler: Compiler) -> dict[str, Graph] | None:
    """Those that any rank has compiled, by their keys; None where the device does not tell them. Collective:
    ranks can have graphs of their own."""
    own = compiler.graphs()
    return None if own is None else {k: graph for found in Ranks().gather(own) for k, graph in found.items()}


def report_graphs(compiler: Compiler | None, manifest: Path) -> None:
    """Log the number of compiled graphs, and warn about each that ``manifest`` does not list. Collective."""
    if compiler is None:
        return
    graphs = graphs_of_all(compiler)
    if graphs is None:
        log.log(NOTICE, "graphs: %d compiled or loaded from Neuron's cache", compiler.count())
        return
    known = read_manifest(manifest, compiler.name)
    if known is None:
        log.log(NOTICE, "graphs: %d compiled; COMPILE=1 would list them in %s", len(graphs), manifest)
        return
    outside = [graph for key, graph in graphs.items() if key not in known]
    counts = len(graphs), len(outside)
    log.log(NOTICE, "graphs: %d compiled, %d outside the manifest %s", *counts, manifest)
    for graph in outside:
        log.warning("not in the manifest: graph %s, %s of shapes %s", graph.key, graph.name, graph.shapes)
