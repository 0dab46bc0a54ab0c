"""What a run needs of whichever engine it has."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from nxdt_align.batch import Topology
from nxdt_align.config.check import neuron_available, resolve_engine
from nxdt_align.config.schema import Config
from nxdt_align.engines.base import Engine
from nxdt_align.models.presets import LlamaConfig
from nxdt_align.run.env import RunEnv


class Checkpoints(Protocol):
    """The checkpoints that an engine writes."""

    def is_checkpoint(self, path: Path) -> bool: ...

    def checkpoint_step(self, path: Path) -> int | None: ...


class Precision(Protocol):
    """Number formats; its text tells apart those that give other log-probabilities."""

    @property
    def compute(self) -> torch.dtype:
        """That of the weights which are computed with."""
        ...

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype with the fewest bits that values pass through."""
        ...


class EngineParts(Protocol):
    """An engine before it is built: its processes have joined."""

    @property
    def device(self) -> torch.device: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def reference_precision(self) -> Precision: ...

    @property
    def checkpoints(self) -> Checkpoints: ...

    def engine(self) -> Engine: ...

    def notes_on(self, folder: Path) -> list[str]:
        """What the user should know of the weights or the checkpoint in ``folder``, which the run reads."""
        ...


def join(config: Config, env: RunEnv, model: LlamaConfig) -> EngineParts:
    """Join the processes of the run, for the engine that ``config`` asks for; only that one is imported."""
    if resolve_engine(config, neuron_available()) == "nxd":
        from nxdt_align.run.nxd import NxDParts

        return NxDParts(config, env, model)
    from nxdt_align.run.native import NativeParts

    return NativeParts(config, env, model)
