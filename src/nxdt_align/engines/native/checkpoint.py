"""The native engine's checkpoint: a folder that is there whole or not at all.

::

    <folder>/checkpoint.json   format, step, and the size and checksum of every other file
    <folder>/tensors/          weights and optimizer state by name (torch.distributed.checkpoint), one file
                               a rank
    <folder>/trainer.pt        the trainer's state and the optimizer's settings, plain values only

Tensors are ``model.<weight>`` and ``optimizer.<weight>.<key>``, with the plain model's names, and keep
their bits and dtypes. They are whole to whoever reads them, whatever ranks have written their parts.
Reading one never executes anything in it. saving.py writes them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nxdt_align.engines.checkpoint_folder import CheckpointError, Summary, damaged, require_same_tensors
from nxdt_align.engines.digests import check_archive
from nxdt_align.engines.native.optimizer_state import NamedOptimizerState, parameter_names, restore
from nxdt_align.engines.native.shards import LocalShard, filling
from nxdt_align.engines.native.tensors import INDEX, DamagedError, TensorFolder, reason
from nxdt_align.engines.ranks import Ranks
from nxdt_align.named_tensors import Spec, WeightSource

TENSORS, TRAINER = "tensors", "trainer.pt"


def _check_content(directory: Path, name: str) -> None:
    """By the checksums that torch wrote into ``name``, and what the index says of it."""
    if name == TRAINER:
        check_archive(directory / name)
    elif Path(name).parts[0] == TENSORS:
        try:
            TensorFolder(directory / TENSORS).check(Path(name).name)
        except DamagedError as error:
            raise ValueError(str(error)) from error


SUMMARY = Summary(
    name="checkpoint.json",
    format="nxdt-align native checkpoint",
    version=1,
    writer="nxdt-align",
    subfolder=TENSORS,
    says={"has_optimizer": bool, "parameters": int, "dtypes": list},
    check_content=_check_content,
)
is_checkpoint, checkpoint_step = SUMMARY.is_checkpoint, SUMMARY.checkpoint_step
require_intact = SUMMARY.require_intact
MODEL, OPTIMIZER = "model.", "optimizer."

T = TypeVar("T")
NamedParameters = Sequence[tuple[str, nn.Parameter]]


@torch.no_grad()
def load(
    directory: Path, named_parameters: NamedParameters, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """Fill the parameters, and the optimizer where one is given, bit for bit; returns ``extra``.

    Every rank calls this with what it holds, whole tensors or DTensors, however many ranks have written
    the checkpoint, and reads its own parts.

    Raises CheckpointError, on every rank: not a checkpoint, incomplete, damaged, or of another shape,
    dtype or set of weights (all are named, and nothing is filled).
    """
    directory, ranks = Path(directory), Ranks()
    parameters: dict[str, Tensor] = {MODEL + name: parameter for name, parameter in named_parameters}
    wanted = _union(ranks.gather({name: (tuple(p.shape), p.dtype) for name, p in named_parameters}))
    moved = None if optimizer is None else parameter_names(optimizer, named_parameters)
    everywhere = set().union(*(names or () for names in ranks.gather(moved)))
    with ranks.together(CheckpointError):
        tensors, trainer = _read(directory)
        require_same_tensors(directory, _weights(tensors), wanted)
        saved = None if optimizer is None else _optimizer_state(directory, tensors, trainer, parameters)
    with ranks.together(CheckpointError):
        with filling(parameters) as parts:
            _guarded(directory, lambda: tensors.read_into(parts))
        if optimizer is not None and saved is not None:
            restore(optimizer, named_parameters, saved, everywhere)
    extra: dict[str, Any] = trainer["extra"]
    return extra


def describe(path: Path) -> dict[str, Any]:
    """step, parameters (count), dtypes of the weights, has_optimizer, bytes.

    Raises CheckpointError where ``path`` is not a whole checkpoint.
    """
    summary = SUMMARY.require_whole(Path(path))
    wanted = ("step", "parameters", "dtypes", "has_optimizer")
    return {key: summary[key] for key in wanted} | {"bytes": sum(summary["files"].values())}


def read_extra(path: Path) -> dict[str, Any]:
    """What ``save`` was given as ``extra``. Raises CheckpointError as ``load`` does."""
    return SUMMARY.plain(Path(path), _read(Path(path))[1]["extra"])


class NativeCheckpoint(WeightSource):
    """The weights of a checkpoint; tensors are read one by one.

    Args:
        unfinished: the folder of tensors in one that is being written, which has no summary yet.

    Raises CheckpointError where the folder is not a whole checkpoint.
    """

    path: Path

    def __init__(self, path: Path, *, unfinished: str | None = None) -> None:
        self.path = Path(path)
        if unfinished is None:
            self._tensors = _open(self.path)
        else:
            self._tensors = _guarded(self.path, lambda: TensorFolder(self.path / unfinished))
        self._names = [n.removeprefix(MODEL) for n in self._tensors.names() if n.startswith(MODEL)]

    def __str__(self) -> str:
        return f"checkpoint {self.path}"

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(MODEL + name)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(MODEL + name)

    def read(self, name: str) -> Tensor:
        return _guarded(self.path, lambda: self._tensors.read(MODEL + name))

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        return _guarded(self.path, lambda: self._tensors.read(MODEL + name, region))


# Reading


def _open(directory: Path) -> TensorFolder:
    """A whole checkpoint's. The index has no checksum but the summary's; tensors have torch's, which are
    compared as they are read."""
    SUMMARY.require_file(directory, SUMMARY.require_whole(directory), f"{TENSORS}/{INDEX}")
    return _guarded(directory, lambda: TensorFolder(directory / TENSORS))


def _read(directory: Path) -> tuple[TensorFolder, dict[str, Any]]:
    tensors = _open(directory)
    try:
        check_archive(directory / TRAINER)
        trainer = torch.load(directory / TRAINER, map_location="cpu", weights_only=True)
        if not isinstance(trainer, dict) or not {"extra", "optimizer"} <= trainer.keys():
            raise ValueError("it is not a trainer's state")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise damaged(directory, f"{TRAINER}: {reason(error)}") from error
    return tensors, trainer


def _weights(tensors: TensorFolder) -> dict[str, Spec]:
    return {
        name.removeprefix(MODEL): (tensors.shape(name), tensors.dtype(name))
        for name in tensors.names()
        if name.startswith(MODEL)
    }


def _union(of_ranks: Sequence[Mapping[str, T]]) -> dict[str, T]:
    return {key: value for held in of_ranks for key, value in held.items()}


def _optimizer_state(
    directory: Path, tensors: TensorFolder, trainer: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> NamedOptimizerState:
    """What was saved for this rank's parameters; state of a parameter's shape is laid out as it is."""
    if trainer["optimizer"] is None:
        raise CheckpointError(
            f"checkpoint {directory} holds no optimizer state; set model.weight_init_only: True to start "
            "a new run from its weights"
        )
    state: dict[str, Tensor] = {}
    for key in (n for n in tensors.names() if n.startswith(OPTIMIZER)):
        name = key.removeprefix(OPTIMIZER)
        parameter = parameters.get(MODEL + name.rpartition(".")[0])
        if parameter is None:
            continue
        is_alike = isinstance(parameter, DTensor) and tensors.shape(key) == tuple(parameter.shape)
        like = parameter if is_alike else torch.empty(tensors.shape(key))
        state[name] = torch.empty_like(like, dtype=tensors.dtype(key), requires_grad=False)
    parts = {OPTIMIZER + name: LocalShard.of(tensor) for name, tensor in state.items()}
    _guarded(directory, lambda: tensors.read_into(parts))
    return NamedOptimizerState(state, trainer["optimizer"])


def _guarded(directory: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except DamagedError as error:
        raise damaged(directory, str(error)) from error
