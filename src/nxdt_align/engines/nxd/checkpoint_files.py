"""The files that ``nxd.save_checkpoint`` has this rank write, when they are written, and how those with a
file per tensor are read.

NxD brings values to the host and decides which rank writes what; it hands each file to a state object,
``g_iostate``. Files stands in its place. With NxD's own (2.29), ``async_save=True``

- copies what is on XLA devices, but not what is on the CPU: in CPU mode training goes on changing it;
- holds for the process as the first save set it, whatever later saves ask;
- waits for the write in ``rendezvous``, which on devices is a collective of XLA's. A rank whose write has
  failed does not come to it, so that the others wait for ever, and it raises the same failure at every
  later save and at exit; in CPU mode ``rendezvous`` waits for nobody;
- marks as done the folder of the save that begins, not that of the one that ended, where these differ;
  and at exit writes into a folder that has got its final name meanwhile.

For the same reason ``nxd.save_checkpoint`` itself cannot run on a thread: its collectives would meet those
of training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from neuronx_distributed.trainer import checkpoint as nxd_checkpoint
from torch import Tensor
from torch_xla.utils.serialization import TensorReference


class Files(nxd_checkpoint.CheckpointIOState):  # type: ignore[misc]
    """One save's files of this rank.

    Args:
        deferred: ``write`` writes them, on any thread; else they are written as NxD gives them.
    """

    def __init__(self, *, deferred: bool) -> None:
        super().__init__(async_save=False)
        self.deferred = deferred
        self._storage: Any = None
        self._pending: list[tuple[Any, str]] = []
        self._names: list[str] = []

    @contextmanager
    def taken_from_nxd(self) -> Iterator[None]:
        """Inside, ``nxd.save_checkpoint`` hands its files to this object."""
        before = nxd_checkpoint.g_iostate
        nxd_checkpoint.g_iostate = self
        try:
            yield
        finally:
            nxd_checkpoint.g_iostate = before

    def write(self) -> None:
        """Write what waits. Raises OSError."""
        while self._pending:
            self._save(*self._pending.pop(0))

    def written(self, folder: Path) -> list[Path]:
        """This rank's files in ``folder``, where NxD was told to save."""
        paths = (Path(os.path.normpath(folder / name)) for name in self._names)
        return [path for path in paths if path.is_relative_to(folder) and path.is_file()]

    def _save(self, content: Any, filename: str) -> None:
        self._names.append(filename)
        try:
            self._storage.save_object(content, filename)
        except RuntimeError as error:
            # torch's writer keeps the system's reason to itself.
            said = str(error).partition("\n")[0]
            raise OSError(
                f"torch could not write {filename} whole; is the disk full, or a quota used up? ({said})"
            ) from error

    # What nxd.save_checkpoint calls.

    def begin(self, checkpoint_dir: Any, tag: str) -> None:
        self._storage = checkpoint_dir
        super().begin(checkpoint_dir, tag)

    def add_save_task(self, obj: Any, filename: str) -> None:
        if self.deferred:
            self._pending.append((obj, filename))
        else:
            self._save(obj, filename)

    def end(self, num_kept: int | None) -> None:
        """Nothing: the caller knows when the files of all ranks are whole."""


def apart_from_training(value: Any) -> Any:
    """``value`` with copies of its tensors on the CPU, which NxD would take as they are."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value
    if isinstance(value, dict):
        return {key: apart_from_training(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(apart_from_training(item) for item in value)
    return value


# Shards with a file per tensor (xser), read on the host. NxD reads them onto the device, beside the model's
# own, and sums there over the data-parallel ranks what one of them has read: in graphs that no other part of
# a run has, and wrongly in CPU mode.

_TENSORS = ".tensors"


def is_xser(folder: Path) -> bool:
    """Whether the shards of ``folder`` have a file per tensor."""
    return any(folder.glob(f"*{_TENSORS}"))


def read_xser(path: Path) -> dict[str, Any]:
    """A shard's content, its tensors on the CPU. Call it inside of ``only_plain_values``.

    Raises what torch.load does for files that are damaged or missing.
    """
    content: dict[str, Any] = _filled(_load(path), path.with_name(path.name + _TENSORS))
    return content


def _filled(value: Any, tensors: Path) -> Any:
    if isinstance(value, TensorReference):
        return _load(tensors / f"tensor_{value.tid}.pt")
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(item, tensors) for item in value)
    return value


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
