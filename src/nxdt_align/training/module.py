"""The Lightning module: one optimizer step per batch, and its metrics."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from nxdt_align.batch import Batch
from nxdt_align.engines.base import Engine, Objective, StepOutput
from nxdt_align.errors import UserError
from nxdt_align.training.finite import FiniteCheck
from nxdt_align.training.phases import Phases
from nxdt_align.training.resumed import ResumedSchedule, overridden

log = logging.getLogger(__name__)
OBJECTIVE_STATE = "objective_state"
"""Key of a checkpoint's values."""
OPTIM_SETTINGS = "optim_settings"
"""The same, of ``OptimizerPlan.settings``."""
HOST_METRICS = ("lr", "global_step", "consumed_samples", "throughput", "throughput_peak")
"""Metrics of a step that are known without the device."""


class AlignmentObjective(Objective, Protocol):
    """An objective that also states what its means are over."""

    state: Tensor | None
    """State carried over from earlier steps."""

    @property
    def normaliser(self) -> str:
        """'pairs' or 'tokens'."""
        ...

    def finish(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Metrics to report, from means over whole global batches."""
        ...


@dataclass(frozen=True)
class TrainingSettings:
    """The settings that a training step reads."""

    gradient_clip_val: float | None
    log_every_n_steps: int
    log_parameter_norm: bool
    log_gradient_norm: bool
    log_step_phases: bool = False
    detect_anomaly: bool = False


@dataclass(frozen=True)
class _Step:
    """What the newest step has computed, on its device."""

    output: StepOutput
    norms: dict[str, Tensor]
    learning_rate: float
    throughput: float


@dataclass(frozen=True)
class OptimizerPlan:
    """Factories of the optimizer and its schedule, called once the parameters exist."""

    build: Callable[[Engine], torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer], Any | None]
    """Returns a learning-rate scheduler with ``step()``, or None for a constant rate. Its ``load_state_dict``
    needs no more than ``last_epoch``, the steps done."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What decides the learning rate: key of ``model.optim`` -> value, in words. Kept in checkpoints, so that
    a resumed run can say what changed."""


class AlignmentModule(LightningModule):
    """Trains an engine's policy with an objective.

    Metrics are logged under NxDT's and TRL's names, as means over the global batch, at the number
    of optimizer steps done.

    Args:
        consumed_samples: records used by a number of optimizer steps.
        finite: stops at a loss or gradient norm that is not finite; None checks nothing.
    """

    def __init__(
        self,
        engine: Engine,
        objective: AlignmentObjective,
        optimizer_plan: OptimizerPlan,
        settings: TrainingSettings,
        consumed_samples: Callable[[int], int],
        finite: FiniteCheck | None = None,
    ) -> None:
        super().__init__()
        # Lightning's own loop would call backward() itself; the engine schedules micro-batches and their
        # backward passes.
        self.automatic_optimization = False
        self.engine = engine
        self._objective = objective
        self._optimizer_plan = optimizer_plan
        self._settings = settings
        self._consumed_samples = consumed_samples
        self._finite = finite
        self._resumed: ResumedSchedule | None = None
        self._groups: list[dict[str, Any]] = []
        self._throughput = Throughput()
        # On a lazy device a step is one graph, which runs after its operations are recorded: there is
        # nothing to wait for within it.
        settles = settings.log_step_phases and not engine.lazy
        self._phases = Phases(self._settle if settles else None)
        self._validation = WeightedMeans()
        self._step: _Step | None = None
        self._numbers: dict[str, float] | None = None
        self.validated_step = -1
        """The optimizer steps done at the newest whole validation of this process."""

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer_plan.build(self.engine)
        self._groups = [dict(group) for group in optimizer.param_groups]
        scheduler = self._optimizer_plan.schedule(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Training

    def on_train_start(self) -> None:
        if self._resumed is not None:
            self._continue_schedule(self._resumed)
        self._throughput.restart()
        self._phases.wait()

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        self._phases.begin_step()
        with self._phases.during("forward_backward"):
            output = self._forward_and_backward(batch)
        with self._phases.during("optimizer"):
            gradient_norm = self.engine.clip_gradients(self._settings.gradient_clip_val)
            optimizer = self._optimizer
            # Before the scheduler's step: the rate that this step used.
            learning_rate = optimizer.param_groups[0]["lr"]
            # A step that the engine skips (see EngineStrategy.optimizer_step) counts too: its data are
            # consumed.
            optimizer.step()
            scheduler: Any = self.lr_schedulers()
            if scheduler is not None and not self.engine.skips_step:
                scheduler.step()
            norms = self._norms(gradient_norm)
            self.engine.mark_step()
        with self._phases.during("metrics"):
            self._keep_for_check(output, gradient_norm)
            self._log_step(output, norms, learning_rate)

    def _forward_and_backward(self, batch: list[Batch]) -> StepOutput:
        try:
            return self.engine.step(self._on_device(batch), self._objective)
        except RuntimeError as error:
            if not (self._settings.detect_anomaly and "returned nan values" in str(error)):
                raise
            raise UserError(
                f"trainer.detect_anomaly: step {self.global_step + 1}: {error} The forward call that it "
                "belongs to is in the warning above. Lower model.optim.lr, or set trainer.gradient_clip_val "
                "or precision.type=fp32"
            ) from error

    def _settle(self) -> None:
        """Wait for the device, which is no lazy one."""
        if self.engine.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.engine.device)

    def on_train_batch_end(self, *_: Any) -> None:
        self._phases.wait()

    @property
    def _optimizer(self) -> Any:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return optimizer

    def _keep_for_check(self, output: StepOutput, gradient_norm: Tensor) -> None:
        """Overflowed gradients, which the engine skips, may well have no finite norm."""
        if self._finite is not None:
            norm = {} if self.engine.skips_step else {"gradient_norm": gradient_norm}
            self._finite.add(self.global_step, {"reduced_train_loss": output.loss, **norm})

    def on_train_end(self) -> None:
        """The steps after the last logged one; a save checks them itself."""
        self._check_steps()

    def say_phases(self) -> None:
        """The shares of the steps so far, for the log; nothing before the first."""
        summary = self._phases.summary()
        if summary:
            log.info("%s", summary)

    def _check_steps(self) -> None:
        if self._finite is not None:
            self._finite.check_steps(self._optimizer)

    def _on_device(self, micro_batches: list[Batch]) -> list[Batch]:
        return [batch.to(self.engine.device) for batch in micro_batches]

    @property
    def _logs_now(self) -> bool:
        return self.global_step % self._settings.log_every_n_steps == 0

    def _norms(self, gradient_norm: Tensor) -> dict[str, Tensor]:
        """Where a step is a compiled graph, every step computes the parameter norm, so that all steps share
        one graph. Overflowed gradients have no norm."""
        norms = {}
        if self._settings.log_parameter_norm and (self._logs_now or self.engine.lazy):
            norms["parameter_norm"] = self.engine.parameter_norm()
        if self._settings.log_gradient_norm and not self.engine.skips_step:
            norms["gradient_norm"] = gradient_norm
        return norms

    def _log_step(self, output: StepOutput, norms: dict[str, Tensor], learning_rate: float) -> None:
        step = self.global_step
        consumed = self._consumed_samples(step)
        throughput = self._throughput.step(consumed - self._consumed_samples(step - 1))
        self._step, self._numbers = _Step(output, norms, learning_rate, throughput), None
        if not self._logs_now:
            # The checkpoint callback builds file names from it; this host-side number needs no device sync.
            self._show({"consumed_samples": float(consumed)})
            return
        numbers = self.step_metrics()
        self._write(numbers)
        self._show(numbers)

    @property
    def step_metric_names(self) -> set[str]:
        """Of what ``step_metrics`` returns."""
        if self._step is None:
            return set()
        names = {
            *HOST_METRICS,
            *self._phase_metrics(),
            "reduced_train_loss",
            *self._step.output.metrics,
            *self._step.norms,
        }
        return names | ({"parameter_norm"} if self._settings.log_parameter_norm else set())

    def step_metrics(self) -> dict[str, float]:
        """The newest step's metrics, as they are logged. A collective call, which waits for the device where
        the step is not one that is logged."""
        if self._numbers is None:
            assert self._step is not None
            self._numbers = self._fetch_metrics(self._step)
        return self._numbers

    def _fetch_metrics(self, of: _Step) -> dict[str, float]:
        output, norms, step = of.output, dict(of.norms), self.global_step
        if self._settings.log_parameter_norm and "parameter_norm" not in norms:
            norms["parameter_norm"] = self.engine.parameter_norm()
        fetched = self._fetch_and_check({"reduced_train_loss": output.loss, **output.metrics, **norms})
        means = {name: fetched[name] for name in ("reduced_train_loss", *output.metrics)}
        numbers = {name: float(value) for name, value in self._objective.finish(means).items()}
        numbers["lr"] = float(of.learning_rate)
        numbers |= {name: float(fetched[name]) for name in norms}
        numbers |= self.engine.status()
        numbers["global_step"] = float(step)
        numbers["consumed_samples"] = float(self._consumed_samples(step))
        numbers["throughput"] = of.throughput
        numbers["throughput_peak"] = self._throughput.peak
        return numbers | self._phase_metrics()

    def _phase_metrics(self) -> dict[str, float]:
        """Seconds of the newest step's phases; of metrics those of the step before."""
        if not self._settings.log_step_phases:
            return {}
        return {f"time/{phase}": seconds for phase, seconds in self._phases.newest.items()}

    def _fetch_and_check(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values on the host, () float32 each, in one transfer with what ``finite`` checks of the steps
        since the last one."""
        kept = [] if self._finite is None else self._finite.take()
        numbers = self.engine.fetch([*values.values(), *(value for _, _, value in kept)])
        for (step, name, _), number in zip(kept, numbers[len(values) :], strict=True):
            assert self._finite is not None
            self._finite.judge(step, name, number, self._optimizer)
        return {
            name: torch.tensor(number) for name, number in zip(values, numbers[: len(values)], strict=True)
        }

    def _show(self, values: Mapping[str, float]) -> None:
        """Show NxDT's fields in the progress bar; pass the others to callbacks that monitor them."""
        for name, value in values.items():
            # batch_size: Lightning would otherwise search the batch for a tensor to read it from.
            self.log(name, value, prog_bar="/" not in name, logger=False, batch_size=1)

    def _write(self, values: Mapping[str, float]) -> None:
        """Log to every logger at the number of optimizer steps done; Lightning's own axis starts at 0."""
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=self.global_step)

    # The objective's state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_steps()
        if self._objective.state is not None:
            checkpoint[OBJECTIVE_STATE] = self._objective.state.cpu()
        checkpoint[OPTIM_SETTINGS] = dict(self._optimizer_plan.settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._objective.state = checkpoint.get(OBJECTIVE_STATE, self._objective.state)
        schedules = checkpoint.get("lr_schedulers") or [None]
        self._resumed = ResumedSchedule(checkpoint.get(OPTIM_SETTINGS), schedules[0])

    def _continue_schedule(self, resumed: ResumedSchedule) -> None:
        """The learning rate is the YAML's from the next step on; says what the YAML changed, and what it
        could not change."""
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None and resumed.schedule is None:
            # Saved without a schedule, so nothing was loaded into this one.
            skipped = int(self.engine.status().get("skipped_steps", 0))
            scheduler.load_state_dict({"last_epoch": self.global_step - skipped})
        groups = self._optimizer.param_groups
        if scheduler is None:
            for group, of_yaml in zip(groups, self._groups, strict=True):
                group["lr"] = of_yaml["lr"]
        step, rate = self.global_step + 1, groups[0]["lr"]
        for change in resumed.changes(self._optimizer_plan.settings, rate):
            log.warning("%s: this counts from step %d on, whose learning rate is %g", change, step, rate)
        cycled = ("betas", "momentum") if getattr(scheduler, "cycle_momentum", False) else ()
        for key, given, kept in overridden(self._groups, groups, besides=cycled):
            log.warning("model.optim.%s is %s in the YAML, but the checkpoint's %s stays", key, given, kept)

    # Validation

    def on_validation_epoch_start(self) -> None:
        self._validation = WeightedMeans()

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        output = self.engine.evaluate(self._on_device(batch), self._objective)
        self.engine.mark_step()
        # All micro-batches of a step carry the same global counts.
        weight = batch[0].global_tokens if self._objective.normaliser == "tokens" else batch[0].global_pairs
        self._validation.add({"loss": output.loss, **output.metrics}, weight)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        means = self._objective.finish(self._validation.means(self.engine.fetch))
        if not means:
            return
        values = {f"val_{name}": float(value) for name, value in means.items()}
        self.validated_step = self.global_step
        self._write(values)
        for name, value in values.items():
            self.log(name, value, prog_bar=name == "val_loss", logger=False, batch_size=1)

    def on_validation_end(self) -> None:
        self._throughput.restart()
        self._phases.wait()


# Measures other than the loss

THROUGHPUT_WINDOW = 10
"""Steps over which NxDT averages its throughput."""


class Throughput:
    """Examples per second over the last steps, and the highest value seen."""

    def __init__(
        self, window: int = THROUGHPUT_WINDOW, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._last = clock()
        self.peak = 0.0

    def restart(self) -> None:
        """Exclude the time since the last step: a validation pass, a checkpoint."""
        self._last = self._clock()

    def step(self, examples: int) -> float:
        """Count a step of ``examples``; returns the examples per second over the window."""
        now = self._clock()
        self._steps.append((now - self._last, examples))
        self._last = now
        seconds = sum(s for s, _ in self._steps)
        value = sum(n for _, n in self._steps) / max(seconds, 1e-9)
        self.peak = max(self.peak, value)
        return value


class WeightedMeans:
    """Means over the examples (or tokens) of several steps. Values stay on their device until ``means``, so
    that no step waits for a transfer."""

    def __init__(self) -> None:
        self._steps: list[tuple[dict[str, Tensor], Tensor]] = []

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """``values`` are means over a step that counts ``weight`` examples (or tokens)."""
        self._steps.append((values, weight))

    def means(self, fetch: Callable[[Sequence[Tensor]], list[float]]) -> dict[str, Tensor]:
        """The means so far, () float32 on the host; empty if nothing was added.

        ``fetch`` brings scalars from their device.
        """
        if not self._steps:
            return {}
        names = list(self._steps[0][0])
        numbers = fetch([t for values, weight in self._steps for t in (*(values[n] for n in names), weight)])
        table = torch.tensor(numbers).view(len(self._steps), len(names) + 1)
        weights = table[:, -1:]
        means = (table[:, :-1] * weights).sum(0) / weights.sum().clamp(min=1.0)
        return dict(zip(names, means, strict=True))
