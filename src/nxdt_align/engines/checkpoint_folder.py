"""A checkpoint's folder, the same for every engine: what describes it and its files, what goes wrong with it,
how ranks write one together, and the plain values that may lie in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nxdt_align.checksums import crc32_of, crc32_of_record
from nxdt_align.engines.base import EngineError, WeightSource
from nxdt_align.engines.digests import share
from nxdt_align.engines.ranks import Ranks
from nxdt_align.files import atomic_folder, explain
from nxdt_align.named_tensors import Spec, require_fit

Shape = tuple[int, ...]


class CheckpointError(EngineError):
    """A checkpoint that cannot be written, read, or used with this model."""


def damaged(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {directory} is damaged: {what}. Take another checkpoint, or copy it again"
    )


_DIGESTS, _OWN_DIGEST = "crc32", "crc32_of_this"
"""Checksums of the other files, and of the summary itself; not in checkpoints of earlier versions."""


def _digest(file: Path) -> str:
    return f"{crc32_of(file):08x}"


@dataclass(frozen=True)
class Summary:
    """A file ``name``: format and version, what the engine says of the checkpoint, and every other file's
    size and checksum."""

    name: str
    format: str
    version: int
    writer: str
    """Of the checkpoint, in messages."""
    subfolder: str = ""
    """Tells of a checkpoint where the file itself is gone; empty where none does."""
    says: Mapping[str, type] = field(default_factory=dict)
    """What the engine says besides ``step``, and its types."""
    check_content: Callable[[Path, str], None] = lambda directory, name: None
    """Raises ValueError for a file that has no checksum here and whose own content is wrong."""

    def is_checkpoint(self, path: Path) -> bool:
        """Whether ``path`` is a checkpoint of this kind, whole or damaged."""
        has_subfolder = bool(self.subfolder) and (Path(path) / self.subfolder).is_dir()
        return has_subfolder or (Path(path) / self.name).is_file()

    def checkpoint_step(self, path: Path) -> int | None:
        """The optimizer steps of a checkpoint whose files are all there in full; None where ``path`` is not
        one."""
        try:
            return int(self.require_whole(Path(path))["step"])
        except CheckpointError:
            return None

    def write(
        self,
        directory: Path,
        said: Mapping[str, Any],
        files: Iterable[Path] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the folder, whose other files (or ``files``) are all there. Raises OSError.

        Args:
            digests: checksums that are known already, by name; the other files are read.
        """
        if files is None:
            files = sorted(f for f in directory.rglob("*") if f.is_file())
        found = {str(f.relative_to(directory)): f for f in files}
        summary = {
            "format": self.format,
            "version": self.version,
            **said,
            "files": {name: f.stat().st_size for name, f in found.items()},
            _DIGESTS: {name: (digests or {}).get(name) or _digest(f) for name, f in found.items()},
        }
        text = json.dumps(summary | {_OWN_DIGEST: crc32_of_record(summary)}, indent=2)
        (directory / self.name).write_text(text + "\n")

    def require_whole(self, directory: Path) -> dict[str, Any]:
        """What the file says. Raises CheckpointError unless every file that it names is there in full; what
        is in them is not read."""
        if not directory.is_dir():
            what = "not a folder" if directory.exists() else "missing"
            raise CheckpointError(f"checkpoint {directory}: {what}")
        summary = self._read(directory)
        for name, size in summary["files"].items():
            path = directory / name
            have = path.stat().st_size if path.is_file() else None
            if have != size:
                what = "is missing" if have is None else f"has {have} bytes instead of {size}"
                raise CheckpointError(
                    f"checkpoint {directory} is incomplete: {name} {what}. "
                    "Take another checkpoint, or copy it again"
                )
        return summary

    def require_intact(self, directory: Path, rank: int = 0, ranks: int = 1) -> None:
        """Compare the checksums of this rank's share of the files.

        Raises CheckpointError naming a file that has changed since it was written, and as ``require_whole``
        does.
        """
        summary = self.require_whole(directory)
        for name in share(summary["files"], rank, ranks):
            self.require_file(directory, summary, name)

    def require_file(self, directory: Path, summary: Mapping[str, Any], name: str) -> None:
        """Compare one file's checksum with ``summary``, which ``require_whole`` has read. Raises
        CheckpointError."""
        wanted = summary.get(_DIGESTS, {}).get(name)
        try:
            if wanted is None:
                self.check_content(directory, name)
            elif (found := _digest(directory / name)) != wanted:
                raise ValueError(
                    f"its bytes have changed since it was written (CRC-32 {found} instead of {wanted})"
                )
        except (OSError, ValueError) as error:
            raise damaged(directory, f"{name}: {error}") from error

    def plain(self, directory: Path, extra: Any) -> dict[str, Any]:
        """``extra`` as it was read. Raises CheckpointError where it is not that of this checkpoint."""
        step = self.require_whole(directory)["step"]
        if not isinstance(extra, dict) or extra.get("global_step", 0) != step:
            raise damaged(
                directory, f"{self.name} says that this is step {step}, the trainer's state does not"
            )
        return extra

    def _read(self, directory: Path) -> dict[str, Any]:
        try:
            summary: dict[str, Any] = json.loads((directory / self.name).read_text())
            if (summary["format"], summary["version"]) != (self.format, self.version):
                raise ValueError(f"format {summary['format']!r}, version {summary['version']}")
            own = summary.pop(_OWN_DIGEST, None)
            if own is not None and own != crc32_of_record(summary):
                raise ValueError("its bytes have changed since it was written")
            for key, kind in ({"step": int, "files": dict} | dict(self.says)).items():
                if not isinstance(summary[key], kind):
                    raise ValueError(f"{key}: {summary[key]!r}")
            if not isinstance(summary.get(_DIGESTS, {}), dict):
                raise ValueError(f"{_DIGESTS}: {summary[_DIGESTS]!r}")
            for name, size in summary["files"].items():
                if not isinstance(size, int) or os.path.isabs(name) or ".." in Path(name).parts:
                    raise ValueError(f"files: {name!r}: {size!r}")
            return summary
        except FileNotFoundError as error:
            raise self._missing(directory) from error
        # RecursionError: brackets in brackets. AttributeError: a list of the right length.
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
            raise CheckpointError(
                f"checkpoint {directory}: {self.name} is not one that this version reads: {error!r}"
            ) from error

    def _missing(self, directory: Path) -> CheckpointError:
        found = sorted(f.name for f in directory.iterdir())
        if not found:
            return CheckpointError(
                f"checkpoint {directory}: the folder is empty; name one that a run has written"
            )
        return CheckpointError(
            f"{directory} is not a whole checkpoint of {self.writer}: {self.name} is missing; it holds "
            + ", ".join(found[:5])
        )


# What goes wrong, in the same words on every engine


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """What can go wrong when the checkpoint ``directory`` is written, as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {directory}: {explain(error)}. Earlier checkpoints are whole, and "
            "the run can resume from the newest"
        ) from error
    except (TypeError, RuntimeError) as error:
        # A value that is not plain; a rank that is gone.
        said = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot write checkpoint {directory}: {said}") from error


def require_same_tensors(directory: Path, saved: Mapping[str, Spec], model: Mapping[str, Spec]) -> None:
    """Raises CheckpointError naming every tensor of another shape or dtype, missing or surplus."""
    require_fit(
        f"checkpoint {directory}",
        saved,
        model,
        error=CheckpointError,
        hint="The model and precision.type must be those of the run that wrote it",
    )


def require_same_shapes(source: WeightSource, model: Mapping[str, Shape]) -> None:
    """Raises EngineError naming every weight that is missing, surplus or of another shape. Any dtype fits:
    a source's values are cast to the parameters'."""
    require_fit(
        source,
        {name: (tuple(source.shape(name)), None) for name in source.names()},
        {name: (shape, None) for name, shape in model.items()},
        error=EngineError,
        hint="model.model_config, model.num_layers and model.hidden_size must be those of the weights",
    )


# Writing


class StagedFolder:
    """The folder that all ranks write a checkpoint into, and that takes its place once all have.

    Rank 0 makes it, describes it and moves it. A context: where that is left with an error, the folder goes
    away, and whatever stood at ``directory`` stays.

    Args:
        directory: on storage that all ranks see.
        ranks: make the same calls.
        subfolders: made before any rank writes.

    Raises CheckpointError, on every rank, where it cannot be made.
    """

    path: Path
    """Where to write."""

    def __init__(self, directory: Path, ranks: Ranks, subfolders: Iterable[str]) -> None:
        self._directory, self._ranks = directory, ranks
        with ExitStack() as stack:
            with self.step():
                own = directory
                if ranks.rank == 0:
                    own = stack.enter_context(atomic_folder(directory))
                    for name in subfolders:
                        (own / name).mkdir()
            self.path = Path(ranks.broadcast(str(own)))
            self._placing = stack.pop_all()

    def __enter__(self) -> StagedFolder:
        return self

    def __exit__(self, *error: Any) -> None:
        self._placing.__exit__(*error)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A part of the save that each rank does by itself; what fails on one fails on all."""
        # Within ``together`` a fault gets the words that the other ranks are told; outside of it, a rank
        # that is gone is one.
        with writing(self._directory), self._ranks.together(CheckpointError), writing(self._directory):
            yield

    def place(
        self, summary: Summary, finish: Callable[[Path], Mapping[str, Any]], written: Iterable[Path]
    ) -> None:
        """Put the folder in its place.

        Args:
            finish: called on rank 0 with the folder, when the files of all ranks are there; returns what
                ``summary`` is to say of it.
            written: this rank's files in the folder, whose checksums it takes: they are in its node's memory
                still. Rank 0 reads those that nobody names.
        """
        with self.step():
            own = {str(file.relative_to(self.path)): _digest(file) for file in written}
        with writing(self._directory):
            digests = {name: digest for of in self._ranks.gather(own) for name, digest in of.items()}
        with self.step():
            if self._ranks.rank == 0:
                summary.write(self.path, finish(self.path), digests=digests)
                self._placing.close()


# Values


def to_plain(value: Any, path: str = "") -> Any:
    """A copy of ``value`` in None, bool, int, float, str, bytes, tensors on the CPU, dtypes, and dicts,
    lists, tuples and sets of them.

    Subclasses and NumPy scalars become the plain type of the same value, paths become text.

    Raises TypeError, naming the key, for anything else: reading it back would need code to be run.
    """
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, torch.dtype):
        return value
    if isinstance(value, Tensor):
        # A view would drag its whole storage into the file.
        return value.detach().cpu().clone()
    if isinstance(value, np.generic) and not isinstance(value, (np.void, np.datetime64, np.timedelta64)):
        return value.item()
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {_key(k, path): to_plain(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
    for container in (list, tuple, set):
        if isinstance(value, container):
            return container(to_plain(item, f"{path}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"{path or 'the value'} is a {type(value).__module__}.{type(value).__qualname__}, but a checkpoint "
        "keeps numbers, text, tensors, and dicts, lists, tuples and sets of them only; convert it in "
        "state_dict()"
    )


def _key(key: Any, path: str) -> Any:
    plain = to_plain(key, f"{path}: the key {key!r}")
    if isinstance(plain, Tensor):
        raise TypeError(f"{path}: a tensor cannot be a key of a checkpoint's dict")
    return plain
