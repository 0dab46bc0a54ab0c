"""Types that the parts of a run exchange: its process, its engine before that is built, its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from nxdt_align.batch import Topology
from nxdt_align.config.schema import Config
from nxdt_align.engines.base import Engine
from nxdt_align.engines.settings import Precision
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.stop_signals import StopSignals


@dataclass(frozen=True)
class RunEnv:
    """This process's position among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    compile_only: bool = False
    """Run only the steps of a dry run, which write nothing (``COMPILE=1``)."""
    compiles_without_device: bool = False
    """Whether TorchNeuron is told to compile only: a dry run then needs its device to be known, not there."""
    signals: StopSignals | None = None
    """What handles signals; None where they have their usual effect."""
    command: str | None = None
    """The user's, to start the run again."""


@dataclass(frozen=True)
class Result:
    """A run's outputs. The paths are None after a dry run, or if nothing was written."""

    step: int
    """Optimizer steps done, those before a resume included."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest value of each metric, validation's under ``val_``."""
    folder: Path | None = None
    """The experiment's folder: logs, resolved settings, checkpoints."""
    checkpoint: Path | None = None
    """The newest checkpoint."""
    export: Path | None = None
    """The policy as a Hugging Face folder."""


class Checkpoints(Protocol):
    """The checkpoints that an engine writes."""

    def is_checkpoint(self, path: Path) -> bool: ...

    def checkpoint_step(self, path: Path) -> int | None: ...

    def require_intact(self, path: Path, rank: int, ranks: int) -> None:
        """Raises CheckpointError if this rank's share of the files is not as it was written."""
        ...

    def read_extra(self, path: Path) -> dict[str, Any]:
        """The trainer's state. Raises CheckpointError."""
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

    @property
    def on_trainium(self) -> bool:
        """Whether rows are for a NeuronCore."""
        ...

    def settle(self, config: Config) -> None:
        """Take the configuration with the layout that the data have chosen, before ``engine``."""
        ...

    def engine(self, adapters: AdapterSpec | None = None) -> Engine: ...

    def notes_on(self, folder: Path) -> list[str]:
        """Notes for the user about the weights or checkpoint in ``folder``, which the run reads."""
        ...
