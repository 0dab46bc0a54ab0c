"""Writing checkpoints: every rank its parts into one folder, which appears when all of them are there.

The format is checkpoint.py's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import torch

from nxdt_align.engines.async_save import AsyncSave, AsyncSaver
from nxdt_align.engines.checkpoint_folder import CheckpointError, to_plain, writing
from nxdt_align.engines.native.checkpoint import (
    MODEL,
    OPTIMIZER,
    SUMMARY,
    TENSORS,
    TRAINER,
    NamedParameters,
)
from nxdt_align.engines.native.collectives import Ranks
from nxdt_align.engines.native.optimizer_state import by_name, merged
from nxdt_align.engines.native.shards import LocalShard
from nxdt_align.engines.native.tensors import TensorFolder, write_tensors
from nxdt_align.files import atomic_folder


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
    """Writes checkpoints, at most one at a time, on a thread where asked. All ranks make the same calls.

    Args:
        timeout: how long a rank waits for the others; torch's default where None.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        super().__init__()
        self._timeout = timeout
        self._ranks: Ranks | None = None

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
        if background:
            self._running = AsyncSave(lambda: _write(content))
        else:
            _write(content)

    def ranks(self) -> Ranks:
        """All ranks in a group of their own over the CPU; the first call is a collective."""
        if self._ranks is None:
            self._ranks = Ranks(own_group=True, timeout=self._timeout)
        return self._ranks


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
    directory, ranks = content.directory, content.ranks
    with writing(directory), ExitStack() as stack:
        # An error in the block takes the temporary folder away; closing the stack puts it in place.
        with ranks.together(CheckpointError), writing(directory):
            own = stack.enter_context(atomic_folder(directory)) if ranks.rank == 0 else directory
            if ranks.rank == 0:
                (own / TENSORS).mkdir()
        folder = ranks.broadcast(own)
        write_tensors(folder / TENSORS, content.parts, ranks)
        with ranks.together(CheckpointError), writing(directory):
            if ranks.rank == 0:
                (folder / TRAINER).write_bytes(content.trainer)
                SUMMARY.write(folder, _summary(folder, content))
                stack.close()


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
