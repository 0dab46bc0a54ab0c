"""A folder of named tensors in torch.distributed.checkpoint's (DCP) format, each rank writing its parts.

DCP reshards on reading: any part can be read of what any other ranks have written. Nothing in a folder
is ever executed on reading: DCP's index is a pickle, of which only DCP's own record types are accepted.
Every tensor carries a checksum (of the zip archive that it is stored as), which is compared on reading.
"""

from __future__ import annotations

import errno
import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from nxdt_align.engines.digests import check_archive
from nxdt_align.engines.native.shards import LocalShard
from nxdt_align.engines.ranks import Ranks

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


def write_tensors(folder: Path, parts: Mapping[str, LocalShard], ranks: Ranks) -> None:
    """Write what the ranks hold into one folder, bits and dtypes as they are. Every rank calls this.

    What several ranks hold is written by one of them. Raises OSError, the same on every rank, where one
    of them cannot write.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_save(
                dict(parts),
                storage_writer=_Writer(folder),
                planner=_ShardSavePlanner(),
                process_group=ranks.group,
                no_dist=ranks.size == 1,
            )
    except CheckpointException as error:
        rank, cause = _first_failure(error)
        if ranks.size > 1 and isinstance(cause, OSError):
            raise OSError(cause.errno, f"{cause.strerror}, on rank {rank}", str(folder)) from error
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

    def check(self, file: str) -> None:
        """Compare the checksums of the tensors in one of the folder's files. Raises DamagedError, OSError."""
        stored = [info for info in self._index.storage_data.values() if info.relative_path == file]
        with open(self.folder / file, "rb") as opened:
            for info in stored:
                try:
                    check_archive(Stretch(opened, info.offset, info.length))
                except ValueError as error:
                    raise DamagedError(str(error)) from error

    def read(self, name: str, region: Sequence[slice] | None = None) -> Tensor:
        """A new tensor on the CPU, in the dtype that it is stored in: all of it, or what ``region``, a start
        and a stop for each dimension, cuts out."""
        shape = self.shape(name)
        cut = [slice(0, n) for n in shape] if region is None else region
        bounds = [part.indices(size) for part, size in zip(cut, shape, strict=True)]
        sizes = [max(0, stop - start) for start, stop, _ in bounds]
        part = LocalShard(
            torch.empty(sizes, dtype=self.dtype(name)), shape, tuple(start for start, _, _ in bounds)
        )
        self.read_into({name: part})
        return part.local

    def read_into(self, parts: Mapping[str, LocalShard]) -> None:
        """Fill the parts' memory, on whatever device it is. Raises DamagedError."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp_load(
                    dict(parts),
                    storage_reader=_Reader(self.folder),
                    planner=_ShardLoadPlanner(),
                    no_dist=True,
                )
        except CheckpointException as error:
            raise DamagedError(f"{self.folder}: {reason(_first_failure(error)[1])}") from error


class _ShardSavePlanner(DefaultSavePlanner):
    """What a rank writes: its parts."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        parts: dict[str, LocalShard] = self.state_dict
        held = {name: part for name, part in parts.items() if part.local.numel() or not prod(part.shape)}
        self.plan = SavePlan([_write_item(name, part) for name, part in held.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        part: LocalShard = self.state_dict[index.fqn]
        return part.local


class _ShardLoadPlanner(DefaultLoadPlanner):
    """What a rank reads: whatever saved chunks overlap with its parts."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, part in self.state_dict.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, entry, [_chunk(part)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        part: LocalShard = self.state_dict[index.fqn]
        return part.local


def _write_item(name: str, part: LocalShard) -> WriteItem:
    chunk = _chunk(part)
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(part.local), torch.Size(part.shape))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _chunk(part: LocalShard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offsets), part.local.size())


class _Writer(FileSystemWriter):
    """DCP's writer, but into a folder that is there, and with the operating system's own errors."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        folder = Path(self.path)
        if not folder.is_dir():
            why = "this rank does not see the folder that rank 0 has made: it must be on storage of all nodes"
            raise FileNotFoundError(errno.ENOENT, why, str(folder))
        return super().prepare_local_plan(plan)

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            found = _os_error(error)
            if found is None:
                raise
            # Plain: what an exception was caused by does not travel to other ranks.
            raise OSError(found.errno, found.strerror) from error


class _Reader(FileSystemReader):
    """DCP's reader, but the index may hold nothing beside DCP's own record types, and checksums count."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / INDEX
        try:
            with open(path, "rb") as file:
                index = _IndexUnpickler(file).load()
            if not isinstance(index, Metadata):
                raise ValueError("it is not an index of tensors")
            _check_index(index)
        # Bits that have changed in a pickle lead to any error there is.
        except Exception as error:
            raise DamagedError(f"{path}: {str(error) or type(error).__name__}") from error
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        try:
            check_archive(Stretch(file, sinfo.offset, sinfo.length))
        except ValueError as error:
            raise ValueError(f"{sinfo.relative_path}: {error}") from error
        return super()._slice_file(file, sinfo)


def _check_index(index: Metadata) -> None:
    """Raises where a record of the index lacks a value, has one of another type, or names no file."""
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if not isinstance(entry.properties.dtype, torch.dtype) or min((*entry.size, 0)) < 0:
            raise ValueError(f"{name} has no shape or dtype")
        for chunk in entry.chunks:
            info = index.storage_data[MetadataIndex(name, chunk.offsets)]
            if not isinstance(info.relative_path, str) or min(info.offset, info.length, *chunk.sizes, 0) < 0:
                raise ValueError(f"{name} is in no file")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in an index")
        return super().find_class(module, name)


def _first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    """The first rank that failed, and its exception."""
    rank = min(error.failures)
    return rank, error.failures[rank][0]


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: torch's writer reports a failed write as its own error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


# Files of torch.save: stretches of them, and words for what is wrong


class Stretch(io.RawIOBase):
    """Some bytes of an open file as a file of their own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def reason(error: BaseException) -> str:
    """Why a file could not be read. Leaves out torch.load's advice to read it with code being run."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds something other than plain values"
    return str(error).partition("\n")[0] or type(error).__name__
