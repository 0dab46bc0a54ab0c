"""The native engine's checkpoint: a folder that is there whole or not at all.

::

    <folder>/checkpoint.json   format, step, and the size of every other file
    <folder>/tensors/          weights and optimizer state by name (torch.distributed.checkpoint)
    <folder>/trainer.pt        the trainer's state and the optimizer's settings, plain values only

Tensors are ``model.<weight>`` and ``optimizer.<weight>.<key>``, with the plain Llama's names, and keep
their bits and dtypes. Reading one never executes anything in it.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native import collectives
from nxdt_align.engines.native.optimizer_state import NamedOptimizerState, by_name, restore
from nxdt_align.engines.native.plain import to_plain
from nxdt_align.engines.native.tensors import DamagedError, TensorFolder, reason, write_tensors
from nxdt_align.files import atomic_folder, explain

FORMAT = "nxdt-align native checkpoint"
VERSION = 1
SUMMARY, TENSORS, TRAINER = "checkpoint.json", "tensors", "trainer.pt"
MODEL, OPTIMIZER = "model.", "optimizer."

T = TypeVar("T")
NamedParameters = Sequence[tuple[str, nn.Parameter]]


class CheckpointError(EngineError):
    """A checkpoint that cannot be written, read, or used with this model."""


def save(
    directory: Path,
    named_parameters: NamedParameters,
    optimizer: torch.optim.Optimizer | None,
    extra: Mapping[str, Any],
    *,
    is_writer: bool = True,
) -> None:
    """Write a checkpoint at ``directory``; whatever was there stays until the new one is whole.

    Every rank calls this; the one with ``is_writer`` (rank 0) writes, and the others wait for it and
    raise what it raises.

    Args:
        extra: numbers, text, tensors and containers of them; ``global_step`` becomes the
            checkpoint's step.

    Raises:
        CheckpointError: the folder cannot be written, or ``extra`` holds a value that is not plain.
    """
    if not is_writer:
        fault = collectives.broadcast_object(None)
        if fault is not None:
            raise CheckpointError(fault)
        return
    try:
        _write(Path(directory), named_parameters, optimizer, extra)
    except Exception as error:
        # The others must not wait for a writer that has given up.
        collectives.broadcast_object(str(error))
        raise
    collectives.broadcast_object(None)


def load(
    directory: Path, named_parameters: NamedParameters, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """Fill the parameters, and the optimizer where one is given, bit for bit; returns ``extra``.

    Raises CheckpointError: not a checkpoint, incomplete, damaged, or of another shape, dtype or set of
    weights (all are named, and nothing is filled).
    """
    directory = Path(directory)
    _require_whole(directory)
    tensors, trainer = _read(directory)
    parameters = {MODEL + name: parameter.detach() for name, parameter in named_parameters}
    _check_fit(directory, tensors, parameters)
    saved = None if optimizer is None else _optimizer_state(directory, tensors, trainer)
    _guarded(directory, lambda: tensors.read_into(parameters))
    if optimizer is not None and saved is not None:
        restore(optimizer, named_parameters, saved)
    extra: dict[str, Any] = trainer["extra"]
    return extra


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint of this kind, whole or damaged."""
    return (Path(path) / SUMMARY).is_file() or (Path(path) / TENSORS).is_dir()


def checkpoint_step(path: Path) -> int | None:
    """The optimizer steps of a whole checkpoint; None where ``path`` is not one."""
    try:
        return int(_require_whole(Path(path))["step"])
    except CheckpointError:
        return None


def describe(path: Path) -> dict[str, Any]:
    """step, parameters (count), dtypes of the weights, has_optimizer, bytes.

    Raises CheckpointError where ``path`` is not a whole checkpoint.
    """
    summary = _require_whole(Path(path))
    wanted = ("step", "parameters", "dtypes", "has_optimizer")
    return {key: summary[key] for key in wanted} | {"bytes": sum(summary["files"].values())}


def read_extra(path: Path) -> dict[str, Any]:
    """What ``save`` was given as ``extra``. Raises CheckpointError as ``load`` does."""
    _require_whole(Path(path))
    extra: dict[str, Any] = _read(Path(path))[1]["extra"]
    return extra


class NativeCheckpoint:
    """The weights of a checkpoint (a WeightSource); tensors are read one by one.

    Raises CheckpointError where the folder is not a whole checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        _require_whole(self.path)
        self._tensors = _guarded(self.path, lambda: TensorFolder(self.path / TENSORS))
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
        """The whole tensor, on the CPU, in the dtype it is stored in."""
        key = MODEL + name
        return _guarded(self.path, lambda: self._tensors.read([key])[key])

    def fingerprint(self) -> str:
        """32 hex digits over every weight's name, dtype, shape and bits; reads them all."""
        digest = blake2b(digest_size=16)
        for name in sorted(self._names):
            tensor = self.read(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


# Writing


def _write(
    directory: Path,
    named_parameters: NamedParameters,
    optimizer: torch.optim.Optimizer | None,
    extra: Mapping[str, Any],
) -> None:
    tensors: dict[str, Tensor] = {MODEL + name: p.detach() for name, p in named_parameters}
    state = None if optimizer is None else by_name(optimizer, named_parameters)
    if state is not None:
        tensors |= {OPTIMIZER + name: tensor for name, tensor in state.tensors.items()}
    try:
        trainer = to_plain({"extra": extra, "optimizer": None if state is None else state.plain})
    except TypeError as error:
        raise CheckpointError(f"cannot write checkpoint {directory}: {error}") from error
    try:
        with atomic_folder(directory) as folder:
            write_tensors(folder / TENSORS, tensors)
            (folder / TRAINER).write_bytes(_to_bytes(trainer))
            summary = _summary(folder, dict(named_parameters), trainer)
            (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {directory}: {explain(error)}. Earlier checkpoints are whole, and "
            "the run can go on from the newest"
        ) from error


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _summary(folder: Path, parameters: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> dict[str, Any]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": int(trainer["extra"].get("global_step", 0)),
        "parameters": sum(p.numel() for p in parameters.values()),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()}),
        "has_optimizer": trainer["optimizer"] is not None,
        "files": {str(f.relative_to(folder)): f.stat().st_size for f in files},
    }


# Reading


def _require_whole(directory: Path) -> dict[str, Any]:
    """``checkpoint.json``. Raises CheckpointError unless every file that it names is there in full."""
    if not directory.is_dir():
        raise CheckpointError(
            f"checkpoint {directory}: {'not a folder' if directory.exists() else 'missing'}"
        )
    found = sorted(f.name for f in directory.iterdir())
    if not found:
        raise CheckpointError(f"checkpoint {directory}: the folder is empty; name one that a run has written")
    if SUMMARY not in found:
        kind = f"{SUMMARY} is missing" if TENSORS in found else f"it holds {', '.join(found[:5])}"
        raise CheckpointError(f"{directory} is not a whole checkpoint of nxdt-align: {kind}")
    try:
        summary = json.loads((directory / SUMMARY).read_text())
        if (summary["format"], summary["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {summary['format']!r}, version {summary['version']}")
        files: dict[str, int] = dict(summary["files"])
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {directory}: {SUMMARY} is not one that this version reads: {error!r}"
        ) from error
    for name, size in files.items():
        path = directory / name
        have = path.stat().st_size if path.is_file() else None
        if have != size:
            what = "is missing" if have is None else f"has {have} bytes instead of {size}"
            raise CheckpointError(
                f"checkpoint {directory} is incomplete: {name} {what}. "
                "Take another checkpoint, or copy it again"
            )
    return dict(summary)


def _read(directory: Path) -> tuple[TensorFolder, dict[str, Any]]:
    tensors = _guarded(directory, lambda: TensorFolder(directory / TENSORS))
    try:
        trainer = torch.load(directory / TRAINER, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise _damaged(directory, f"{TRAINER}: {reason(error)}") from error
    return tensors, trainer


def _check_fit(directory: Path, tensors: TensorFolder, parameters: Mapping[str, Tensor]) -> None:
    """Report all weights of another shape, dtype or name at once."""
    there, wanted = {n for n in tensors.names() if n.startswith(MODEL)}, set(parameters)
    faults = []
    for key in sorted(there & wanted):
        name, have, want = key.removeprefix(MODEL), tensors.shape(key), tuple(parameters[key].shape)
        if have != want:
            faults.append(f"{name} has shape {list(have)}, but the model has {list(want)}")
        elif tensors.dtype(key) != parameters[key].dtype:
            faults.append(f"{name} is {tensors.dtype(key)}, but the model keeps {parameters[key].dtype}")
    faults += [f"missing: {n.removeprefix(MODEL)}" for n in sorted(wanted - there)]
    faults += [f"not in the model: {n.removeprefix(MODEL)}" for n in sorted(there - wanted)]
    if faults:
        raise CheckpointError(
            f"checkpoint {directory} does not fit the model ({len(faults)} tensors):\n  "
            + "\n  ".join(faults)
            + "\nThe model and precision.type must be those of the run that wrote it"
        )


def _optimizer_state(
    directory: Path, tensors: TensorFolder, trainer: Mapping[str, Any]
) -> NamedOptimizerState:
    if trainer["optimizer"] is None:
        raise CheckpointError(
            f"checkpoint {directory} holds no optimizer state; set model.weight_init_only: True to start "
            "a new run from its weights"
        )
    names = [n for n in tensors.names() if n.startswith(OPTIMIZER)]
    read = _guarded(directory, lambda: tensors.read(names))
    return NamedOptimizerState({n.removeprefix(OPTIMIZER): t for n, t in read.items()}, trainer["optimizer"])


def _guarded(directory: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except DamagedError as error:
        raise _damaged(directory, str(error)) from error


def _damaged(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {directory} is damaged: {what}. Take another checkpoint, or copy it again"
    )
