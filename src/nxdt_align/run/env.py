"""What the launcher says about a process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunEnv:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    compile_only: bool = False
    """Trial steps that write nothing (``COMPILE=1``)."""
