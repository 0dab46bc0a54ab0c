"""Device values beside the loss."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nxdt_align.neuron.monitor import NeuronMonitor


class DeviceMonitor(Callback):
    """Logs ``monitor``'s newest report at the logging interval, at the number of optimizer steps done.

    One process of each node has this callback. Lightning's loggers write on the first node alone; on the
    others the monitor's warnings are what is left of it.
    """

    def __init__(self, monitor: NeuronMonitor, every_n_steps: int) -> None:
        self._monitor = monitor
        self._every_n_steps = every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitor.start()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        report = self._monitor.newest() if step % self._every_n_steps == 0 else None
        if report is not None:
            for logger in trainer.loggers:
                logger.log_metrics(report.metrics(), step=step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitor.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._monitor.stop()
