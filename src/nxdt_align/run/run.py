"""One run: builds its objects in dependency order, and runs its steps."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator

from nxdt_align.config.engines import Engine as EngineName
from nxdt_align.config.optim import SCHEDULERS
from nxdt_align.config.schema import Config
from nxdt_align.config.start import FOR_EXPORT
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.steps import Split
from nxdt_align.engines.base import Shapes, WeightSource, shapes_of
from nxdt_align.engines.ranks import Ranks
from nxdt_align.errors import UserError
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.types import Loss
from nxdt_align.messages import NOTICE, RunLog
from nxdt_align.planning.rows import row_reports, summary
from nxdt_align.reference.cache import ReferenceStore
from nxdt_align.run import assemble, processes
from nxdt_align.run.adapters import adapted, export_adapter, record_of, say, spec_of
from nxdt_align.run.contracts import Result, RunEnv
from nxdt_align.run.export_check import check_export, trainer_values
from nxdt_align.run.locate import companions
from nxdt_align.run.mode import RunMode
from nxdt_align.run.places import Places
from nxdt_align.run.preconditions import as_user_error, require_validation_in_epoch
from nxdt_align.run.ready import require_ready
from nxdt_align.run.reference import (
    ORIGIN,
    find_origin,
    open_store,
    origin_record,
    reference_callbacks,
    require_stored_reference,
)
from nxdt_align.run.resume import (
    RUN_RECORD,
    RunFolder,
    RunIdentity,
    another_runs_checkpoint,
    continued_checkpoint,
    identify,
    newest_checkpoint,
)
from nxdt_align.run.rows import row_multiple, row_needs, with_possible_layout
from nxdt_align.run.samples import sample_callbacks
from nxdt_align.run.settle import settle
from nxdt_align.stop_signals import Stopped
from nxdt_align.training import optim
from nxdt_align.training.curves import quiet_event_writers
from nxdt_align.training.finite import FiniteCheck
from nxdt_align.training.hooks import PREFLIGHT_TOLERANCE, FinishRun, ReferenceOrigin, ReferencePass
from nxdt_align.training.module import AlignmentModule, OptimizerPlan, TrainingSettings
from nxdt_align.training.monitors import RecompileGuard, StartTimes
from nxdt_align.training.progress import RunProgress, seconds_of
from nxdt_align.training.samples import SampleDuringEval
from nxdt_align.training.stopping import StopOnSignal
from nxdt_align.training.strategy import EngineAccelerator, EngineStrategy
from nxdt_align.weights.generation import generation_json, note_unused_sampling
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.peft import MergedWeights, merged

log = logging.getLogger(__name__)


class Run:
    """A run of this process, which is one of ``env.world_size``.

    Args:
        config: checked.
        engine: the one that runs it.
        mode: what is done besides the steps; ``DryRun`` writes nothing.
        run_log: open; gets the run's folder.
        loss: a loss to use instead of the one in ``config``.
        callbacks: further Lightning callbacks, called after this package's.
    """

    def __init__(
        self,
        config: Config,
        engine: EngineName,
        env: RunEnv,
        mode: RunMode,
        run_log: RunLog,
        *,
        loss: Loss | Callable[..., Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        settled = settle(config, engine)
        config = settled.config
        for note in settled.notes if env.rank == 0 else ():
            log.log(NOTICE, "%s", note)
        self.config, self.env, self.mode, self._run_log = config, env, mode, run_log
        self.places = Places(config)
        self._fingerprints: dict[WeightSource, str] = {}
        self._times = StartTimes(enabled=config.exp_manager.enable_recovery_time_instrumentation)
        ready = require_ready(config, engine, env, mode)
        self.config = config = with_possible_layout(config, ready.model)
        assemble.say_implementation(config, ready.model)
        self.model_config, self.start, self.tokenization = ready.model, ready.start, ready.tokenization
        self._callbacks = [*assemble.own_callbacks(config), *callbacks]
        chosen = assemble.loss(config, engine, loss)
        self._loss = None if loss is None else repr(chosen)
        self.objective = GlobalMeanObjective(chosen, token_statistics=config.exp_manager.log_token_statistics)
        self.parts = assemble.join(config, engine, env, self.model_config, mode)
        self._times.done("processes joined")
        self.topology = self.parts.topology
        device_type = "neuron" if self.parts.on_trainium else self.parts.device.type
        self.data = ModelAlignmentDataModule(
            config,
            self.tokenization,
            self.topology,
            cache_dir=mode.token_cache(self.places),
            with_prompts=self.objective.needs_prompts,
            **assemble.micro_batch_needs(config),
            fixed_micro_batches=mode.fixes_micro_batches(self.parts.device),
            **row_needs(
                *(config, engine, self.model_config, device_type),
                needs_reference=self.objective.needs_reference,
            ),
        )
        choice = self.data.choice
        if choice is not None:
            log.log(NOTICE, "%s", choice.summary)
            self.config = config = config.with_layout(choice.layout)
            self.parts.settle(config)
        self._row_multiple = row_multiple(config, engine, self.model_config, device_type)
        reports = row_reports(self.data.splits, config.data)
        log.log(NOTICE, "data: %s", summary(reports))
        for split, report in reports.items():
            log.info("%s data: %s", split, report)
        require_validation_in_epoch(config, self.data.steps_per_epoch)
        mode.prepare(self.data, self._steps())
        self._generation = self._generation_config()
        self._times.done("data read")
        self._adapters = spec_of(config, self.model_config, self.start)
        self.engine = self.parts.engine(self._adapters)
        self._finite = FiniteCheck(self.engine) if mode.checks_values else None
        self._times.done("model made")

    def fit(self) -> Result:
        """Find a checkpoint of this run, train to the end, and export."""
        with ExitStack() as held:
            return self._fit(held)

    def _fit(self, held: ExitStack) -> Result:
        """``held``: keeps other runs from this one's folder."""
        # The data order has its own generator; this seeds dropout and what user code draws.
        seed_everything(self.config.seed, verbose=False)
        self._require_same_start()
        identity = self._identity()
        checkpoints = self.parts.checkpoints
        found = self.mode.find_run(self.config, self.places, identity, checkpoints, self.engine)
        run = held.enter_context(found)
        resumed = self.mode.resume_point(self.config, run, checkpoints, self.start, self.engine)
        continued = None if resumed == run.checkpoint else resumed
        if self._adapters is not None:
            self._require_weights_alone(continued)
            needed = self.objective.needs_reference
            say(self.config, self._adapters, self.start, has_reference=needed)
        if resumed is None or self._adapters is not None:
            # Else the trainer loads them, with the optimizer's state; checkpoints of adapters have no base.
            self.engine.load_weights(adapted(self.config, self.model_config, self.start))
        self._times.done("start weights loaded" if resumed is None else "this run looked for")
        self._note_what_is_read(run)
        self.mode.say_what_is_kept(self.env.signals, run.checkpoint, self._keeps_reference)
        stop = self._stop_on_signal()
        # A run that goes on from another's checkpoint keeps that one's reference; where it is itself resumed,
        # its own checkpoint says which.
        goes_on = another_runs_checkpoint(self.config, checkpoints) is not None
        origin = self._origin(resumed if goes_on else None)
        answers = self._samples(run, origin)
        reference, record = self._reference(origin, answers)
        export = self.mode.export_folder(self.config, run)
        with as_user_error(), quiet_event_writers():
            callbacks = [
                self._times,
                *self.mode.monitors(self.config, self.env),
                *reference,
                *self._recompile_guard(),
                *self._progress(),
                *answers,
                *self.mode.profilers(self.config, self.env, run, self.engine.device),
                FinishRun(
                    self.engine, self._export, export, self._finite, self.parts.precision.compute, stop
                ),
                *self._callbacks,
                *([] if stop is None else [stop]),
            ]
            record |= record_of(self._adapters, self.start)
            trainer = self._trainer(callbacks, {"identity": identity.digest, **record})
            step = None if run.checkpoint is None else checkpoints.checkpoint_step(run.checkpoint)
            self.mode.start_experiment(trainer, self.config, run, identity, step)
            if trainer.is_global_zero:
                self.mode.keep_companions(run, self.tokenization, self._generation)
                self.mode.keep_log(self._run_log, run)
            self.mode.require_compiled(
                self.engine.compiler,
                self.places.manifest,
                self._planned_shapes,
                stop=self.config.exp_manager.fail_on_recompile,
            )
            with self.mode.around_fit(self.engine.compiler, self.places.manifest):
                self._train(trainer, run, resumed)
        result = self._result(trainer, run, export)
        samples = self.data.consumed_samples(result.step)
        self.mode.conclude(self.engine.compiler, self.places.manifest, result, samples)
        if self.env.rank == 0:
            self.mode.report(self.config, run)
        return result

    def _train(self, trainer: Trainer, run: RunFolder, resumed: Path | None) -> None:
        """Whatever ends it, what was done is said; the report of a run that a signal ends comes after its
        checkpoint. Of an error there is none: it may be one of this rank alone, for which others wait."""
        module = self._module()
        try:
            trainer.fit(module, datamodule=self.data, ckpt_path=None if resumed is None else str(resumed))
        except Stopped as stopped:
            if self.env.rank == 0 and (stopped.together or stopped.is_saved):
                self.mode.report(self.config, run)
            raise
        finally:
            module.say_phases()

    def _result(self, trainer: Trainer, run: RunFolder, export: Path | None) -> Result:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        callback: Any = trainer.checkpoint_callback
        if callback is None:
            return Result(trainer.global_step, metrics)
        newest = newest_checkpoint(Path(callback.dirpath), self.parts.checkpoints.checkpoint_step)
        return Result(trainer.global_step, metrics, run.path, newest, export)

    # Which run this is

    def _require_same_start(self) -> None:
        """Collective. Raises UserError where ranks found different newest checkpoints of a run that is still
        writing them."""
        own = self.config.exp_manager.resume_from_checkpoint
        first = self.engine.broadcast_object(own)
        if own != first:
            raise UserError(
                f"exp_manager.resume_from_checkpoint: processes found different newest checkpoints, {first} "
                f"and {own}: name one of them, or wait until the run that writes them ends"
            )

    @staticmethod
    def _require_weights_alone(continued: Path | None) -> None:
        """Raise UserError for adapters where ``continued``, another run's checkpoint, gives its optimizer
        too."""
        if continued is not None:
            raise UserError(
                f"model.weight_init_only: must be True with model_alignment_strategy.peft, as {continued} "
                "is another run's checkpoint: adapters start from its weights, not from its optimizer"
            )

    def _generation_config(self) -> dict[str, Any]:
        """What the start's folder says, and the tokens that the training data's responses end with."""
        start, model = self.config.exp_manager.resume_from_checkpoint, self.config.model.model_config
        found = companions(None if start is None else Path(start), None if model is None else Path(model))
        if found.generation is not None and found.generation_folder is not None and self.env.rank == 0:
            note_unused_sampling(found.generation, found.generation_folder)
        ends = self.data.splits["train"].examples.ends(self.config.data.seq_length)
        return generation_json(self.model_config, found.generation, ends)

    def _identity(self) -> RunIdentity:
        return identify(
            self.config,
            self.data.fingerprint("train"),
            start=self._fingerprint(self.start),
            model=self.model_config.to_record(),
            tokenization=self.tokenization.fingerprint(),
            loss=self._loss,
        )

    def _fingerprint(self, source: WeightSource) -> str:
        """Collective. Reads all weights, so only rank 0 computes it, once per source."""
        if source not in self._fingerprints:
            own = source.fingerprint() if self.topology.rank == 0 else ""
            self._fingerprints[source] = str(self.engine.broadcast_object(own))
        return self._fingerprints[source]

    def _note_what_is_read(self, run: RunFolder) -> None:
        read = run.checkpoint or self.config.exp_manager.resume_from_checkpoint
        for note in self.parts.notes_on(Path(read)) if read is not None else []:
            log.log(NOTICE, "%s", note)

    # Parts of the trainer

    def _origin(self, recorded: Path | None) -> ReferenceOrigin | None:
        """Of the reference, where there is one. ``recorded``: a checkpoint that says which."""
        if not self.objective.needs_reference:
            return None
        return find_origin(self.config, self.model_config, self.start, recorded)

    def _reference(
        self, origin: ReferenceOrigin | None, samples: Sequence[SampleDuringEval]
    ) -> tuple[list[Callback], dict[str, Any]]:
        """The reference's callbacks, and its record for each checkpoint. ``samples`` ask it what it answers
        while it is there."""
        if origin is None:
            return [], {}
        store = self._store(origin) if self._keeps_reference else None
        precisions = (self.parts.precision, self.parts.reference_precision)
        callbacks = reference_callbacks(
            *(self.config, self.mode, self.engine, self.data, origin, precisions, store),
            beside=next((each.ask_reference for each in samples if each.wants_reference), None),
        )
        return callbacks, {ORIGIN: origin_record(origin.source, self._fingerprint(origin.source))}

    def _store(self, origin: ReferenceOrigin) -> ReferenceStore:
        """Collective."""
        return open_store(
            self.config,
            self.mode,
            self.places.reference,
            weights=self._fingerprint(origin.source),
            model=str(self.model_config),
            tokenization=self.tokenization.fingerprint(),
            precision=str(self.parts.reference_precision),
            has_adapter=isinstance(origin.source, MergedWeights),
        )

    def reference_alone(self) -> tuple[ReferencePass, ReferenceStore, bool]:
        """Instead of ``fit``: the reference pass that this run would begin with as a new one, its store, and
        whether the policy is at its start; start weights are loaded. Collective.

        Raises UserError where the objective reads no stored reference.
        """
        require_stored_reference(self.config, needed=self.objective.needs_reference)
        self._require_same_start()
        continued = continued_checkpoint(self.config, self.parts.checkpoints, self.engine)
        if self._adapters is not None:
            self._require_weights_alone(continued)
        if continued is None:
            self.engine.load_weights(adapted(self.config, self.model_config, self.start))
        self.mode.say_what_is_kept(self.env.signals, None, keeps_reference=True)
        origin = find_origin(self.config, self.model_config, self.start, continued)
        store = self._store(origin)
        alike = self.parts.precision == self.parts.reference_precision
        own = ReferencePass(self.engine, self.data, store, origin, like_policy=alike)
        return own, store, continued is None

    @property
    def _keeps_reference(self) -> bool:
        return (
            self.objective.needs_reference and self.config.model_alignment_strategy.precompute_ref_log_probs
        )

    def _stop_on_signal(self) -> StopOnSignal | None:
        """Collective."""
        signals = self.env.signals
        if signals is None or not self.mode.finishes_steps:
            return None
        # Over the host, and apart from what the device's collectives and a save in the background use.
        ranks = Ranks.apart(processes.timeout(self.config))
        return StopOnSignal(self.engine, signals, ranks.largest)

    def _recompile_guard(self) -> list[Callback]:
        compiler, stop = self.engine.compiler, self.config.exp_manager.fail_on_recompile
        if compiler is None:
            return []
        return [RecompileGuard(compiler, stop=stop, ahead=self.mode.ahead(compiler, self.places.manifest))]

    def _samples(self, run: RunFolder, origin: ReferenceOrigin | None) -> list[SampleDuringEval]:
        if not self.mode.makes_samples:
            return []
        return sample_callbacks(
            self.config,
            self.engine,
            self.data,
            self.tokenization,
            self._generation,
            self.model_config,
            row_multiple=self._row_multiple,
            folder=run.path,
            is_new=run.checkpoint is None,
            reference=None if origin is None else "start" if origin.is_loaded else "other",
        )

    def _progress(self) -> list[Callback]:
        if not self.config.trainer.enable_progress_bar:
            return []
        unit = "examples" if self.config.model_alignment_strategy.objective in ("kto", "sft") else "pairs"
        limits = (self.config.trainer.max_time, self.config.exp_manager.max_time_per_run)
        seconds = min((seconds_of(limit) for limit in limits if limit is not None), default=None)
        return [RunProgress(self._steps(), unit, self.config.trainer.log_every_n_steps, seconds=seconds)]

    def _planned_shapes(self) -> Iterator[tuple[str, Shapes]]:
        """Names of the steps' graphs, and the shapes of their micro-batches, each once."""
        names: dict[Split, str] = {"train": "training step", "val": "validation step"}
        for split, steps in self.data.shapes_of_run(self._steps()).items():
            found = (shapes_of(steps[index]) for index in range(len(steps)))
            yield from ((names[split], shapes) for shapes in dict.fromkeys(found))

    def _module(self) -> AlignmentModule:
        config, model = self.config, self.config.model
        settings = TrainingSettings(
            gradient_clip_val=config.trainer.gradient_clip_val,
            log_every_n_steps=config.trainer.log_every_n_steps,
            log_parameter_norm=config.exp_manager.log_parameter_norm,
            log_gradient_norm=config.exp_manager.log_gradient_norm,
            log_step_phases=config.exp_manager.log_step_phases,
            detect_anomaly=config.trainer.detect_anomaly,
        )
        plan = OptimizerPlan(
            build=lambda engine: engine.adopt_optimizer(
                optim.build_optimizer(
                    engine.named_parameters(),
                    model.optim.name,
                    model.optim.settings(),
                    layer_norm_weight_decay=model.do_layer_norm_weight_decay,
                )
            ),
            schedule=self._schedule,
            settings=self._schedule_settings(),
        )
        return AlignmentModule(
            self.engine, self.objective, plan, settings, self.data.consumed_samples, self._finite
        )

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any | None:
        sched = self.config.model.optim.sched
        if sched is None:
            return None
        return optim.build_scheduler(optimizer, sched.name, sched.settings(), self._steps())

    def _schedule_settings(self) -> dict[str, str]:
        """What decides the learning rate, by key of ``model.optim``."""
        optim, sched = self.config.model.optim, self.config.model.optim.sched
        chosen: dict[str, Any] = {"name": optim.name, "lr": optim.settings()["lr"]}
        if sched is not None:
            settings = sched.settings()
            if "max_steps" in SCHEDULERS.get(sched.name or "", ()) and settings.get("max_steps") in (
                None,
                -1,
            ):
                settings = {**settings, "max_steps": self._steps()}
            chosen |= {"sched.name": sched.name, **{f"sched.{key}": v for key, v in settings.items()}}
        given = {key: value for key, value in chosen.items() if value is not None}
        return {key: v if isinstance(v, str) else json.dumps(v) for key, v in given.items()}

    def _steps(self) -> int:
        """Optimizer steps of the run, the smaller limit of max_steps and max_epochs; -1 if only max_time ends
        it."""
        trainer = self.config.trainer
        limits = [trainer.max_steps, trainer.max_epochs * self.data.steps_per_epoch]
        return min((limit for limit in limits if limit > 0), default=-1)

    def _trainer(self, callbacks: list[Callback], record: dict[str, Any]) -> Trainer:
        settings = self.config.trainer
        # Lightning advises sync_dist for validation metrics, but they are already means over all ranks.
        warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
        strategy = EngineStrategy(
            self.engine,
            processes.cluster(self.env),
            {RUN_RECORD: record},
            background=self.config.exp_manager.async_checkpointing,
            finite=self._finite,
        )
        trainer = Trainer(
            accelerator=_accelerator(self.engine.device),
            strategy=strategy,
            devices=self.env.world_size // settings.num_nodes,
            num_nodes=settings.num_nodes,
            **self.mode.extent(self.config),
            log_every_n_steps=settings.log_every_n_steps,
            detect_anomaly=settings.detect_anomaly,
            enable_progress_bar=settings.enable_progress_bar,
            enable_model_summary=False,
            enable_checkpointing=False,  # exp_manager adds its own callback and loggers
            logger=False,
            use_distributed_sampler=False,  # the data module's sampler divides the data, and resumes
            callbacks=callbacks,
        )
        # Lightning's own handler of SIGTERM talks to the other ranks from within, in the middle of whatever
        # they do, and ends with status 0.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    # The export

    def _export(self, folder: Path) -> None:
        """Rank 0 writes one weight at a time; all ranks take part in gathering each."""
        adapters_alone = self._adapters is not None and self.config.exports_adapter
        # On a lazy device the check would be another graph to compile.
        checks = self.config.exp_manager.check_export and not (self.engine.lazy or adapters_alone)
        values = trainer_values(self.engine, self.data) if checks else []
        weights = self.engine.whole_parameters(trainable=adapters_alone)
        fault: UserError | None = None
        try:
            if self.topology.rank == 0:
                self._write_export(folder, weights)
                if values:
                    precision = self.parts.precision
                    check_export(
                        folder,
                        values,
                        self.data.splits["train"].examples,
                        precision.compute,
                        PREFLIGHT_TOLERANCE[precision.coarsest],
                    )
        except UserError as error:
            fault = error
        for _ in weights:
            """Keep joining the gathers: other ranks only gather, and rank 0 may have failed half-way."""
        told = self.engine.broadcast_object(None if fault is None else str(fault))
        if told is not None:
            raise fault or UserError(told)

    def _write_export(self, folder: Path, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self._adapters is not None and self.config.exports_adapter:
            export_adapter(folder, self.model_config, self._adapters, weights, self.start)
            return
        write_hf_folder(
            folder,
            self.model_config,
            weights if self._adapters is None else merged(weights, self._adapters),
            tokenizer_dir=folder.parent / FOR_EXPORT,  # which keep_companions wrote
            generation=self._generation,
            dtype=self.parts.precision.compute,
            overwrite=True,
        )


def _accelerator(device: torch.device) -> str | Accelerator:
    return device.type if device.type in ("cpu", "cuda") else EngineAccelerator()
