"""What a run needs of an engine before it is built, whichever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from nxdt_align.batch import Topology
from nxdt_align.engines.base import Engine


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
