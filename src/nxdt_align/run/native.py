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
from nxdt_align.errors import UserError
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.decoder import CausalModel
from nxdt_align.models.nf4 import require_library
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.ops.attention import FUSED_DEVICES
from nxdt_align.run import assemble, computing, processes
from nxdt_align.run.adapters import spec_of
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.mode import RunMode

_OPERATIONS = "no graph is listed: TorchNeuron's cache gets operations one by one"


def check(config: Config, env: RunEnv, model: ModelShape, mode: RunMode) -> torch.device:
    """This process's device. Raises UserError if it is not there, or if sizes or the attention do not fit."""
    device = processes.device(config, env, mode)
    check_parallel(model, assemble.parallel(config))
    if not isinstance(model, DecoderConfig) and device.type not in FUSED_DEVICES:
        raise UserError(
            f"trainer.accelerator: a {model.model_type} is computed by transformers, which runs on cpu and "
            f"cuda here, but this run's device is {device.type}: set trainer.accelerator to one of them"
        )
    computing.attention(config, device, model)
    spec = spec_of(config, model)
    if spec is not None and spec.quantize is not None:
        check_parallel(model, assemble.parallel(config), is_quantized=True)
        require_library(device)
    computing.compiling(config, device, model)
    return device


class NativeParts:
    """Joins the run's processes and builds its engine. Raises UserError for sizes that do not fit the
    model."""

    checkpoints = checkpoint

    def __init__(self, config: Config, env: RunEnv, model: ModelShape, mode: RunMode) -> None:
        self._config, self._model = config, model
        self.device = check(config, env, model, mode)
        self.topology = processes.start_processes(config, env, self.device)
        self.precision = computing.precision(config)
        self._compiling = computing.compiling(config, self.device, model)
        computing.say_choices(config, self.device, model)
        if self._compiling is None and self.device.type not in ("cpu", "xla"):  # of these the mode has told
            why = computing.why_op_by_op(config, self.device, model)
            mode.note_no_graphs(why, *([_OPERATIONS] if self.on_trainium else []))
        self.reference_precision = computing.reference_precision(config)

    @property
    def on_trainium(self) -> bool:
        return self.device.type == "neuron"

    def settle(self, config: Config) -> None:
        self._config = config

    def engine(self, adapters: AdapterSpec | None = None) -> Engine:
        computing.say_attention(self._config, self.device, self._model)
        model = self._config.model
        granularity = model.activations_checkpoint_granularity
        recompute = tuple(model.activations_checkpoint_recompute or ())
        on_xla = self.device.type == "xla"
        how = xla.recompute if on_xla else None
        balance = model.router_aux_loss_coef

        def configure(decoder: CausalModel) -> None:
            decoder.set_checkpointing(granularity, recompute, how)
            if balance:
                decoder.balance_router(balance)

        engine = (XlaEngine if on_xla else NativeEngine)(
            self._model,
            computing.attention(self._config, self.device, self._model),
            precision=self.precision,
            reference_precision=self.reference_precision,
            topology=self.topology,
            parallel=assemble.parallel(self._config),
            device=self.device,
            configure_model=configure,
            timeout=processes.timeout(self._config),
            adapters=adapters,
            seed=self._config.seed,
            compiling=self._compiling,
        )
        if on_xla:
            engine.compiler = xla.compiler()
        elif self._compiling is not None:
            engine.compiler = self._compiling.recorder
        return engine

    def notes_on(self, folder: Path) -> list[str]:
        return []
