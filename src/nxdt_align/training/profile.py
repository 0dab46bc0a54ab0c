"""Traces of a few steps, by torch's profiler, for Perfetto (https://ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from nxdt_align.config.schema import ProfilerConfig
from nxdt_align.files import explain
from nxdt_align.messages import NOTICE

log = logging.getLogger(__name__)

_OF_DEVICE = {
    "cuda": ProfilerActivity.CUDA,
    "xpu": ProfilerActivity.XPU,
    "neuron": ProfilerActivity.PrivateUse1,
}


class ProfileSteps(Callback):
    """Writes ``profile/rank_R_step_N.json.gz`` into the run's folder at the end of each cycle.

    Args:
        folder: the run's.
        rank: this process's; without ``config.all_ranks`` the first alone is profiled.
    """

    def __init__(self, config: ProfilerConfig, folder: Path, rank: int, device: torch.device) -> None:
        self._config, self._folder, self._rank = config, folder / "profile", rank
        own = _OF_DEVICE.get(device.type)
        self._activities = [ProfilerActivity.CPU]
        if own is not None and own in supported_activities():  # type: ignore[no-untyped-call]
            self._activities.append(own)
        elif device.type != "cpu":
            log.log(NOTICE, "trainer.profiler: torch's profiler sees the host alone on %s", device.type)
        self._profiler: Any = None
        self._step = 0
        self._done, self._has_trace = 0, False
        """Steps of this process, and whether a trace of some of them was to be written."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        config = self._config
        self._profiler = profile(
            activities=self._activities,
            schedule=schedule(
                wait=config.wait, warmup=config.warmup, active=config.active, repeat=config.repeat
            ),
            on_trace_ready=self._write,
            record_shapes=config.record_shapes,
            profile_memory=config.profile_memory,
            with_stack=config.with_stack,
        )
        self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._step = trainer.global_step
        self._done += 1
        self._profiler.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._profiler is None:
            return
        config, skipped = self._config, self._config.wait + self._config.warmup
        if self._done % (skipped + config.active) == skipped:
            # The first step to be kept has not been taken: the profiler would write a trace of what came
            # after the last one.
            self._profiler.on_trace_ready = None
        # A cycle that the run's end cuts short is written as far as it goes.
        self._profiler.stop()
        self._profiler = None
        if not self._has_trace:
            what = "trainer.profiler: no trace, as the run ended after %d steps, within wait + warmup (%d)"
            log.log(NOTICE, what, self._done, skipped)

    def _write(self, profiler: Any) -> None:
        self._has_trace = True
        file = self._folder / f"rank_{self._rank}_step_{self._step}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except OSError as error:
            log.warning("the trace %s cannot be written: %s; training goes on", file, explain(error))
            return
        log.log(NOTICE, "trace: %s (open it at https://ui.perfetto.dev)", file)
