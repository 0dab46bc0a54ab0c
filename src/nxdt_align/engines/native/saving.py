"""Writing checkpoints: every rank its parts into one folder, which appears when all of them are there.

The format is checkpoint.py's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from nxdt_align.engines.async_save import AsyncSaver
from nxdt_align.engines.checkpoint_folder import CheckpointError, StagedFolder, to_plain, writing
from nxdt_align.engines.native.checkpoint import (
    MODEL,
    OPTIMIZER,
    SUMMARY,
    TENSORS,
    TRAINER,
    NamedParameters,
)
from nxdt_align.engines.native.optimizer_state import by_name, merged
from nxdt_align.engines.native.shards import LocalShard
from nxdt_align.engines.native.tensors import TensorFolder, write_tensors
from nxdt_align.engines.ranks import Ranks


def save(
    directory: Path,
    named_parameters: NamedParameters,
    optimizer: torch.optim.Optimizer | None,
    extra: Mapping[str, Any],
) -> None:
    """Write a checkpoint at ``directory``; whatever was there stays until the new one is whole.

    Every rank calls this with what it holds, whole tensors or DTensors; ``directory`` is on storage that
    all ranks see.

    Args:
        extra: numbers, text, tensors and containers of them; ``global_step`` becomes the
            checkpoint's step. Rank 0's counts.

    Raises:
        CheckpointError: a rank cannot write, or ``extra`` holds a value that is not plain. The same on
            every rank.
    """
    _write(_collect(Path(directory), named_parameters, optimizer, extra, Ranks()))


class Saver(AsyncSaver):
    """Writes native's checkpoints. All ranks make the same calls."""

    def save(
        self,
        directory: Path,
        named_parameters: NamedParameters,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> None:
        """As ``save``, once the one before is done.

        Args:
            background: return as soon as the values are copied, in this rank's memory on the CPU. What
                fails after that is raised by the next ``save`` or ``finish``.
        """
        self.finish()
        content = _collect(Path(directory), named_parameters, optimizer, extra, self.ranks())
        if background or content.is_lazy:
            content = content.copied()
        self._write(lambda: _write(content), background=background)


@dataclass(frozen=True)
class _Content:
    """What one rank brings to a checkpoint."""

    directory: Path
    parts: dict[str, LocalShard]
    trainer: bytes
    """The file of the trainer's state: rank 0's, empty elsewhere."""
    step: int
    has_optimizer: bool
    ranks: Ranks

    @property
    def is_lazy(self) -> bool:
        """Whether each view of a value that is written would be a graph to compile."""
        return any(part.local.device.type == "xla" for part in self.parts.values())

    def copied(self) -> _Content:
        """The same, with values that training does not change."""
        parts = {name: part.copied() for name, part in self.parts.items()}
        return _Content(self.directory, parts, self.trainer, self.step, self.has_optimizer, self.ranks)


@torch.no_grad()
def _collect(
    directory: Path,
    named_parameters: NamedParameters,
    optimizer: torch.optim.Optimizer | None,
    extra: Mapping[str, Any],
    ranks: Ranks,
) -> _Content:
    with ranks.together(CheckpointError), writing(directory):
        tensors = {MODEL + name: parameter.detach() for name, parameter in named_parameters}
        state = None if optimizer is None else by_name(optimizer, named_parameters)
        settings = None if state is None else to_plain(state.plain)
        if state is not None:
            tensors |= {OPTIMIZER + name: tensor for name, tensor in state.tensors.items()}
        parts = {name: LocalShard.of(tensor) for name, tensor in tensors.items()}
        values = to_plain({"extra": extra}) if ranks.rank == 0 else {"extra": {}}
    of_ranks = [each for each in ranks.gather(settings) if each is not None]
    values["optimizer"] = merged(of_ranks) if of_ranks else None
    step = int(values["extra"].get("global_step", 0))
    return _Content(directory, parts, _to_bytes(values), step, optimizer is not None, ranks)


def _write(content: _Content) -> None:
    """The folder, from all ranks; the same fault on all of them."""
    ranks = content.ranks

    def finish(folder: Path) -> dict[str, Any]:
        (folder / TRAINER).write_bytes(content.trainer)
        return _summary(folder, content)

    with writing(content.directory), StagedFolder(content.directory, ranks, [TENSORS]) as folder:
        write_tensors(folder.path / TENSORS, content.parts, ranks)
        # As DCP names a rank's files.
        folder.place(SUMMARY, finish, (folder.path / TENSORS).glob(f"__{ranks.rank}_*"))


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _summary(folder: Path, content: _Content) -> dict[str, Any]:
    written = TensorFolder(folder / TENSORS)
    weights = [name for name in written.names() if name.startswith(MODEL)]
    return {
        "step": content.step,
        "parameters": sum(prod(written.shape(name)) for name in weights),
        "dtypes": sorted({str(written.dtype(name)).removeprefix("torch.") for name in weights}),
        "has_optimizer": content.has_optimizer,
    }
