"""One run: its objects, made in the order in which they need each other."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator

from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.engines.base import WeightSource
from nxdt_align.errors import UserError
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.neuron.monitor import NeuronMonitor
from nxdt_align.reference.cache import ReferenceStore, fingerprint_of
from nxdt_align.run import assemble
from nxdt_align.run.dry_run import compiling, conclude_run, manifest_path
from nxdt_align.run.engines import join
from nxdt_align.run.env import RunEnv
from nxdt_align.run.preconditions import (
    misconfiguration_is_the_users,
    require_validation_in_epoch,
    require_writable,
)
from nxdt_align.run.reference_origin import ORIGIN, RUN_RECORD, find_origin, origin_record
from nxdt_align.training import optim
from nxdt_align.training.accelerator import EngineAccelerator
from nxdt_align.training.devices import DeviceMonitor
from nxdt_align.training.experiment import start_experiment
from nxdt_align.training.hooks import (
    PREFLIGHT_TOLERANCE,
    FinishRun,
    Preflight,
    ReferenceDuringTraining,
    ReferenceOrigin,
    ReferencePass,
)
from nxdt_align.training.module import AlignmentModule, OptimizerPlan, TrainingSettings
from nxdt_align.training.recompiles import RecompileGuard
from nxdt_align.training.runs import RunFolder, explicit_run, find_run, run_identity, write_identity
from nxdt_align.training.start_times import StartTimes
from nxdt_align.training.strategy import EngineStrategy
from nxdt_align.weights.hf_writer import write_hf_folder

log = logging.getLogger(__name__)
EXPORT = "hf_export"
"""Folder of an experiment that holds the policy for transformers."""


class Run:
    """A run of this process, which is one of ``env.world_size``."""

    def __init__(self, config: Config, env: RunEnv) -> None:
        self.config = config
        self.env = env
        self._fingerprints: dict[WeightSource, str] = {}
        self._times = StartTimes(enabled=config.exp_manager.enable_recovery_time_instrumentation)
        if not env.compile_only:
            self._require_writable_places()
        self.objective = GlobalMeanObjective(
            assemble.loss(config), token_statistics=config.exp_manager.log_token_statistics
        )
        self.model_config = assemble.model_config(config)
        self.parts = join(config, env, self.model_config)
        self._times.done("processes joined")
        self.topology = self.parts.topology
        self.start = assemble.start_weights(config, self.model_config)
        self.tokenization = assemble.tokenization(config, self.model_config)
        self.data = ModelAlignmentDataModule(
            config,
            self.tokenization,
            self.topology,
            cache_dir=None if env.compile_only else self._cache("tokens"),
            with_prompts=self.objective.needs_prompts,
            **assemble.micro_batch_needs(config),
            fixed_micro_batches=self.parts.device.type == "xla" or env.compile_only,
        )
        require_validation_in_epoch(config, self.data.steps_per_epoch)
        if env.compile_only:
            self.data.start_trial(self._steps())
        self._times.done("data read")
        self.engine = self.parts.engine()
        self._times.done("model made")

    def fit(self) -> int:
        seed_everything(self.config.seed, verbose=False)
        identity_parts = self._identity_parts()
        identity = run_identity(identity_parts)
        run = self._find_run(identity)
        if run.checkpoint is None:
            self.engine.load_weights(self.start)
        self._times.done("this run looked for" if run.checkpoint is not None else "start weights loaded")
        resumed = self._resume_point(run)
        self._note_what_is_read(run)
        callbacks, record = self._reference(None if resumed == run.checkpoint else resumed)
        compiler, stop = self.engine.compiler, self.config.exp_manager.fail_on_recompile
        if compiler is not None:
            callbacks.append(RecompileGuard(compiler.count, stop=stop))
        exports = self.config.exp_manager.export_hf and not self.env.compile_only
        finish = FinishRun(self.engine, self._export, run.path / EXPORT if exports else None)
        with misconfiguration_is_the_users():
            first = [self._times, *self._monitor()]
            trainer = self._trainer([*first, *callbacks, finish], {"identity": identity, **record})
            if not self.env.compile_only:
                self._start_experiment(trainer, run, identity, identity_parts)
            taken_up = None if resumed is None else str(resumed)
            with self._trial():
                trainer.fit(self._module(), datamodule=self.data, ckpt_path=taken_up)
        self._conclude(trainer, run)
        return 0

    def _trial(self) -> AbstractContextManager[None]:
        if not self.env.compile_only:
            return nullcontext()
        return compiling(self.engine.compiler, self._manifest)

    # Places

    @property
    def _experiments(self) -> Path:
        return Path(self.config.exp_manager.exp_dir or "nemo_experiments").absolute()

    @property
    def _runs(self) -> Path:
        """Where the dated folders are."""
        return self._experiments / (self.config.exp_manager.name or self.config.name)

    @property
    def _manifest(self) -> Path:
        return manifest_path(self._experiments, self.config)

    def _require_writable_places(self) -> None:
        settings, cache = self.config.exp_manager, self.config.data.cache_dir
        if settings.explicit_log_dir is not None:
            require_writable("exp_manager.explicit_log_dir", Path(settings.explicit_log_dir).absolute())
        else:
            require_writable("exp_manager.exp_dir", self._runs)
        key = "exp_manager.exp_dir" if cache is None else "data.cache_dir"
        require_writable(key, self._cache("tokens").absolute())

    def _cache(self, what: str) -> Path:
        chosen = self.config.data.cache_dir
        return (Path(chosen) if chosen is not None else self._experiments / "cache") / what

    def _identity_parts(self) -> dict[str, Any]:
        """What makes two runs the same one. Data and start weights count by content; how they are
        laid out and spread over devices does not count."""
        return {
            "objective": dataclasses.asdict(self.config.model_alignment_strategy),
            "data": fingerprint_of({"records": " ".join(self.data.record_ids("train"))}),
            "tokenization": self.tokenization.fingerprint(),
            "order": [self.config.seed, self.config.data.global_batch_size],
            "start": self._fingerprint(self.start),
            "model": self.model_config.to_hf_dict(),
        }

    def _fingerprint(self, source: WeightSource) -> str:
        """Reads all weights, so each source is asked once, by rank 0. Every rank calls this."""
        if source not in self._fingerprints:
            own = source.fingerprint() if self.topology.rank == 0 else ""
            self._fingerprints[source] = str(self.engine.broadcast_object(own))
        return self._fingerprints[source]

    def _find_run(self, identity: str) -> RunFolder:
        """Rank 0 looks; the others follow."""

        settings = self.config.exp_manager
        if self.env.compile_only:
            return RunFolder(self._experiments, None)
        run = None
        step_of = self.parts.checkpoints.checkpoint_step
        if self.topology.rank == 0 and settings.explicit_log_dir is not None:
            folder = Path(settings.explicit_log_dir).absolute()
            run = explicit_run(folder, identity, step_of, resume=settings.resume_if_exists)
        elif self.topology.rank == 0:
            run = find_run(self._runs, identity, step_of, resume=settings.resume_if_exists)
        found: RunFolder = self.engine.broadcast_object(run)
        must_resume = settings.resume_if_exists and not settings.resume_ignore_no_checkpoint
        if found.checkpoint is None and must_resume:
            raise UserError(
                "exp_manager.resume_ignore_no_checkpoint: is False, so a run with resume_if_exists must find "
                f"a checkpoint of its own, but {found.path.parent} has none; True starts a new run"
            )
        return found

    def _resume_point(self, run: RunFolder) -> Path | None:
        """The checkpoint that is taken up with optimizer and position, and a line that says which."""
        given = self.config.exp_manager.resume_from_checkpoint
        if self.env.compile_only:
            return None  # a trial's steps are not those behind a checkpoint; its graphs are the same
        if run.checkpoint is not None:
            log.info("going on from this run's own checkpoint %s", run.checkpoint)
            if given is not None:
                log.info("resume_from_checkpoint=%s is not read again: it is where this run started", given)
            return run.checkpoint
        takes_all = given is not None and not self.config.model.weight_init_only
        if given is not None and takes_all and self.parts.checkpoints.is_checkpoint(Path(given)):
            log.info("going on from resume_from_checkpoint=%s, optimizer state included", given)
            return Path(given)
        log.info("a new run, from %s", self.start)
        return None

    def _note_what_is_read(self, run: RunFolder) -> None:
        read = run.checkpoint or self.config.exp_manager.resume_from_checkpoint
        for note in self.parts.notes_on(Path(read)) if read is not None else []:
            log.info("%s", note)

    # Parts

    def _reference(self, continued: Path | None) -> tuple[list[Callback], dict[str, Any]]:
        """The callbacks that see to the reference, and what each checkpoint says of it.

        ``continued``: another run's checkpoint that this one goes on from.
        """
        if not self.objective.needs_reference:
            return [], {}
        origin = find_origin(self.config, self.model_config, self.start, continued)
        record = {ORIGIN: origin_record(origin.source, self._fingerprint(origin.source))}
        before = self.config.model_alignment_strategy.precompute_ref_log_probs
        store = self._store(origin) if before else None
        alike, trial = self.parts.reference_precision == self.parts.precision, self.env.compile_only
        first: Callback = ReferenceDuringTraining(self.engine, origin, like_policy=alike)
        if store is not None:
            first = ReferencePass(self.engine, self.data, store, origin, trial=trial, like_policy=alike)
        if not self.config.exp_manager.preflight:
            return [first], record
        precisions = (self.parts.precision, self.parts.reference_precision)
        tolerance = max(PREFLIGHT_TOLERANCE[p.coarsest] for p in precisions)
        preflight = Preflight(
            self.engine,
            self.data,
            tolerance,
            by_intent=not origin.is_start,
            store=None if store is None else store.folder,
            trial=self.env.compile_only,
        )
        return [first, preflight], record

    def _monitor(self) -> list[Callback]:
        """neuron-monitor sees every process of its node, so one of them starts it."""
        if self.env.local_rank != 0 or self.env.compile_only:
            return []
        return [DeviceMonitor(NeuronMonitor(), self.config.trainer.log_every_n_steps)]

    def _store(self, origin: ReferenceOrigin) -> ReferenceStore:
        made_from = {
            "weights": self._fingerprint(origin.source),
            "model": str(self.model_config),
            "tokenization": self.tokenization.fingerprint(),
            "precision": str(self.parts.reference_precision),
        }
        dpo = self.config.model_alignment_strategy.dpo
        if dpo is not None and dpo.ld_alpha is not None:
            made_from["ld_alpha"] = str(dpo.ld_alpha)
        return ReferenceStore(
            self._cache("reference"),
            fingerprint_of(made_from),
            width=2,
            description=made_from,
            read_only=self.env.compile_only,
            ignore_adds=self.env.compile_only,
        )

    def _module(self) -> AlignmentModule:
        config, model = self.config, self.config.model
        settings = TrainingSettings(
            gradient_clip_val=config.trainer.gradient_clip_val,
            log_every_n_steps=config.trainer.log_every_n_steps,
            log_parameter_norm=config.exp_manager.log_parameter_norm,
            log_gradient_norm=config.exp_manager.log_gradient_norm,
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
            schedule=lambda optimizer: self._schedule(optimizer),
        )
        return AlignmentModule(self.engine, self.objective, plan, settings, self.data.consumed_samples)

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any | None:
        sched = self.config.model.optim.sched
        if sched is None:
            return None
        return optim.build_scheduler(optimizer, sched.name, sched.settings(), self._steps())

    def _steps(self) -> int:
        """Optimizer steps of the run, by whichever of max_steps and max_epochs ends it; -1 where only
        max_time does."""
        trainer = self.config.trainer
        limits = [trainer.max_steps, trainer.max_epochs * self.data.steps_per_epoch]
        return min((limit for limit in limits if limit > 0), default=-1)

    def _trainer(self, callbacks: list[Callback], record: dict[str, Any]) -> Trainer:
        settings = self.config.trainer
        # Advice to reduce validation's values, which are means over all ranks already.
        warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
        strategy = EngineStrategy(
            self.engine,
            assemble.cluster(self.env),
            {RUN_RECORD: record},
            background=self.config.exp_manager.async_checkpointing,
        )
        return Trainer(
            accelerator=_accelerator(self.engine.device),
            strategy=strategy,
            devices=self.env.world_size // settings.num_nodes,
            num_nodes=settings.num_nodes,
            **self._extent(),
            log_every_n_steps=settings.log_every_n_steps,
            enable_progress_bar=settings.enable_progress_bar,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            use_distributed_sampler=False,
            callbacks=callbacks,
        )

    def _extent(self) -> dict[str, Any]:
        """How many steps, and when validation comes: in a trial run once, behind all of its steps."""
        if self.env.compile_only:
            whole = {"limit_train_batches": 1.0, "limit_val_batches": 1.0, "val_check_interval": 1.0}
            return whole | {"max_epochs": 1, "check_val_every_n_epoch": 1, "num_sanity_val_steps": 0}
        names = ("max_steps", "max_epochs", "max_time", "val_check_interval", "check_val_every_n_epoch")
        limits = ("num_sanity_val_steps", "limit_val_batches", "limit_train_batches")
        return {name: getattr(self.config.trainer, name) for name in (*names, *limits)}

    def _start_experiment(
        self, trainer: Trainer, run: RunFolder, identity: str, identity_parts: dict[str, Any]
    ) -> None:
        settings = self.config.exp_manager
        step = 0 if run.checkpoint is None else self.parts.checkpoints.checkpoint_step(run.checkpoint) or 0
        start_experiment(
            trainer,
            dataclasses.asdict(settings),
            run,
            explicit=settings.explicit_log_dir is not None,
            resumed_step=step,
        )
        if self.topology.rank == 0:
            write_identity(run.path, identity, identity_parts)

    # The end

    def _export(self, folder: Path) -> None:
        """Rank 0 writes, one weight after the other, which all ranks put together."""
        weights = self.engine.whole_parameters()
        fault: UserError | None = None
        try:
            if self.topology.rank == 0:
                self._write_export(folder, weights)
        except UserError as error:
            fault = error
        for _ in weights:
            """The other ranks' turn, also where the first has given up."""
        told = self.engine.broadcast_object(None if fault is None else str(fault))
        if told is not None:
            raise fault or UserError(told)

    def _write_export(self, folder: Path, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        tokenizer = Path(self.config.data.tokenizer.type)
        write_hf_folder(
            folder,
            self.model_config,
            weights,
            tokenizer_dir=tokenizer if tokenizer.is_dir() else None,
            dtype=self.parts.precision.compute,
            overwrite=True,
        )

    def _conclude(self, trainer: Trainer, run: RunFolder) -> None:
        steps = trainer.global_step
        if self.env.compile_only:
            log.info("trial run done: %d steps, of which nothing was written", steps)
            return
        conclude_run(self.engine.compiler, self._manifest)
        log.info("done: %d steps, %d samples", steps, self.data.consumed_samples(steps))
        log.info("experiment folder: %s", run.path)
        if self.config.exp_manager.export_hf:
            log.info("Hugging Face export: %s", run.path / EXPORT)


def _accelerator(device: torch.device) -> str | Accelerator:
    return device.type if device.type in ("cpu", "cuda") else EngineAccelerator()
