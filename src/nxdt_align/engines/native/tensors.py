"""A folder of named tensors in torch.distributed.checkpoint's (DCP) format, from one process.

DCP's format, so that another layout of ranks can read its own shards of it. Nothing in a folder is
ever executed on reading: DCP's index is a pickle, of which only DCP's own record types are accepted.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

INDEX = ".metadata"

_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"}
    | {str(t).removeprefix("torch.") for t in vars(torch).values() if isinstance(t, torch.dtype)},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class DamagedError(Exception):
    """A folder of tensors that cannot be read; the message says where it is broken."""


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors as one shard. Raises OSError where the folder cannot be written.

    Bits and dtypes are kept. A tensor that is split over ranks is refused: one process does not
    hold all of it.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and tensor.device_mesh.size() > 1:
            raise NotImplementedError(f"{name} is split over ranks; writing shards is not supported yet")
    whole = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_save(whole, storage_writer=FileSystemWriter(folder), no_dist=True)
    except CheckpointException as error:
        cause = _cause(error)
        found = _os_error(cause)
        if found is not None:
            raise OSError(found.errno, found.strerror, str(folder)) from error
        raise cause from error


class TensorFolder:
    """Reads what ``write_tensors`` wrote. Raises DamagedError where the index cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = _Reader(folder).read_metadata()
        self.entries: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].properties.dtype

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """New tensors on the CPU, in the dtype that they are stored in."""
        tensors = {name: torch.empty(self.shape(name), dtype=self.dtype(name)) for name in names}
        self.read_into(tensors)
        return tensors

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, on their own devices. Raises DamagedError."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp_load(dict(tensors), storage_reader=_Reader(self.folder), no_dist=True)
        except CheckpointException as error:
            raise DamagedError(f"{self.folder}: {reason(_cause(error))}") from error


class _Reader(FileSystemReader):
    """DCP's reader, but the index may hold nothing beside DCP's own record types."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / INDEX
        try:
            with open(path, "rb") as file:
                index = _IndexUnpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError, TypeError) as error:
            raise DamagedError(f"{path}: {error}") from error
        if not isinstance(index, Metadata):
            raise DamagedError(f"{path}: it is not an index of tensors")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in an index")
        return super().find_class(module, name)


def reason(error: BaseException) -> str:
    """Why a file could not be read. Leaves out torch.load's advice to read it with code being run."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds something other than plain values"
    return str(error).partition("\n")[0] or type(error).__name__


def _cause(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: torch's writer reports a failed write as its own error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
