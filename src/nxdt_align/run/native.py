"""The native engine's part of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from nxdt_align.config.schema import Config
from nxdt_align.engines import xla
from nxdt_align.engines.base import Engine
from nxdt_align.engines.native import checkpoint
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.model import check_parallel
from nxdt_align.engines.native.xla_engine import XlaEngine
from nxdt_align.models.presets import ModelShape
from nxdt_align.run import assemble
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.mode import RunMode


def check(config: Config, env: RunEnv, model: ModelShape, mode: RunMode) -> torch.device:
    """This process's device. Raises UserError if it is not there, or if sizes or the attention do not fit."""
    device = assemble.device(config, env, mode)
    check_parallel(model, assemble.parallel(config))
    assemble.attention(config, device, model)
    return device


class NativeParts:
    """Joins the run's processes and builds its engine. Raises UserError for sizes that do not fit the
    model."""

    checkpoints = checkpoint

    def __init__(self, config: Config, env: RunEnv, model: ModelShape, mode: RunMode) -> None:
        self._config, self._model = config, model
        self.device = check(config, env, model, mode)
        self.topology = assemble.start_processes(config, env, self.device)
        self.precision = assemble.precision(config)
        self._attention = assemble.attention(config, self.device, model)
        self.reference_precision = assemble.reference_precision(config)

    @property
    def row_multiple(self) -> int:
        return assemble.row_multiple(self._config, self.device, self._model)

    def engine(self) -> Engine:
        model = self._config.model
        granularity = model.activations_checkpoint_granularity
        recompute = tuple(model.activations_checkpoint_recompute or ())
        on_xla = self.device.type == "xla"
        how = xla.recompute if on_xla else None
        engine = (XlaEngine if on_xla else NativeEngine)(
            self._model,
            self._attention,
            precision=self.precision,
            reference_precision=self.reference_precision,
            topology=self.topology,
            parallel=assemble.parallel(self._config),
            device=self.device,
            configure_model=lambda decoder: decoder.set_checkpointing(granularity, recompute, how),
            timeout=assemble.timeout(self._config),
        )
        if on_xla:
            engine.compiler = xla.compiler()
        return engine

    def notes_on(self, folder: Path) -> list[str]:
        return []
