"""A small run in a folder of its own, and whether it ends where an undisturbed one ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from training_fixture import TIMES, Project, scalars

from chaos.processes import Command, Ended, Moment, Running, Strike, moments, start, start_ranks
from nxdt_align.engines.native.checkpoint import NativeCheckpoint, checkpoint_step

STEPS = 6
LEFTOVERS = (".*.nxdt-tmp", ".*.nxdt-old", ".removing-*", "*-unfinished", "*.partial")
"""What an unfinished write leaves."""


@dataclass(frozen=True)
class Kind:
    """``overrides`` of the run's YAML, and the number of its processes."""

    name: str
    overrides: tuple[str, ...] = ()
    ranks: int = 1


ALONE = Kind("1 process")
ASYNC = Kind("asynchronous saves", ("exp_manager.async_checkpointing=True",))
TWO = Kind("2 processes", ("trainer.devices=2",), ranks=2)


@dataclass(frozen=True)
class Result:
    """What a run leaves: weights of its last checkpoint, files of its export, and curves but for times."""

    weights: Mapping[str, torch.Tensor]
    export: Mapping[str, bytes]
    curves: Mapping[str, Mapping[int, float]]

    @classmethod
    def of(cls, run: Path) -> Result:
        checkpoints = {checkpoint_step(f): f for f in (run / "checkpoints").iterdir() if f.name[0] != "."}
        source = NativeCheckpoint(checkpoints[max(step for step in checkpoints if step is not None)])
        return cls(
            {name: source.read(name) for name in source.names()},
            {file.name: file.read_bytes() for file in (run / "hf_export").iterdir()},
            {tag: dict(points) for tag, points in scalars(run).items() if tag not in TIMES},
        )

    def difference(self, other: Result) -> str:
        """Weights and exports bit for bit. Of the curves, those points that were written before a kill."""
        if self.weights.keys() != other.weights.keys() or any(
            not torch.equal(self.weights[name], other.weights[name]) for name in self.weights
        ):
            return "other weights"
        if self.export != other.export:
            return "another export"
        for tag, points in self.curves.items():
            if any(other.curves.get(tag, {}).get(step) != value for step, value in points.items()):
                return f"another curve of {tag}"
        return ""


class Trial:
    """Its files lie in ``folder``; what its processes say, too."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.kind = folder, kind
        (folder / "project").mkdir(parents=True)
        self.project = Project.create(folder / "project", pairs=12)

    def command(self, *overrides: str) -> Command:
        params = "exp_manager.checkpoint_callback_params"
        settings = (f"trainer.max_steps={STEPS}", f"{params}.save_top_k=2", *self.kind.overrides, *overrides)
        return Command(self.project.arguments(*settings), below=self.project.root)

    def start(
        self,
        *overrides: str,
        strike: Strike | None = None,
        rank: int = 0,
        largest_file: int | None = None,
        wait: bool = True,
    ) -> list[Running]:
        """``strike`` and ``largest_file`` befall the process of ``rank`` alone. With ``wait`` it starts in a
        second in which no other run has started."""
        command = self.command(*overrides)
        struck = replace(command, strike=strike, largest_file=largest_file)
        if wait:
            self.project.await_next_second(self.project.root)
        if self.kind.ranks == 1:
            return [start(struck, self.folder)]
        return start_ranks([struck if r == rank else command for r in range(self.kind.ranks)], self.folder)

    def run(self, *overrides: str, **how: object) -> list[Ended]:
        return [process.wait() for process in self.start(*overrides, **how)]  # type: ignore[arg-type]

    def finish(self, truth: Result) -> str:
        """Start it again, undisturbed. Returns what is wrong with how it ends: nothing."""
        for ended in self.run():
            if ended.status != 0:
                return ended.fault or f"the next start ends with {ended.status}: {ended.error}"
        return self.compare(truth)

    def compare(self, truth: Result) -> str:
        """What is wrong with a run that says that it is done."""
        *earlier, run = self.project.runs()
        passed_over = [r for r in earlier if any(map(checkpoint_step, (r / "checkpoints").glob("[!.]*")))]
        if passed_over:
            return "a new run, though there was a checkpoint"
        # A folder is as large as a checkpoint. A run that was killed before its first one is not gone on
        # with, and what its caches left is removed by a later write into them.
        left = [f for pattern in LEFTOVERS for f in run.parent.rglob(pattern)]
        left = [f for f in left if f.is_dir() or f.is_relative_to(run)]
        if left:
            return f"left {left[0].name}"
        return Result.of(run).difference(truth)

    def moments(self) -> list[Moment]:
        """Of rank 0, in a run that nothing befalls."""
        assert self.kind.ranks == 1
        ended, found = moments(self.command(), self.folder)
        assert ended.status == 0, ended.said[-3000:]
        return found

    @cached_property
    def result(self) -> Result:
        """Of a run that nothing befalls."""
        assert all(ended.status == 0 for ended in self.run())
        return Result.of(self.project.only_run())
