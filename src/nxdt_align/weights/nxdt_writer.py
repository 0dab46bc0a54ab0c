"""Writes NxD's checkpoint folder, one whole weight at a time, in any order and from several threads.

Every file is first created at full size, by torch.save without the tensor bytes; each weight is then split
and written into it. Names and order are those of NxD's own converter.
"""

from __future__ import annotations

import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import serialization

from nxdt_align.checksums import crc32_of
from nxdt_align.models.partition import EMBEDDING, HEAD, Partition, local_tensors
from nxdt_align.models.presets import weight_shapes
from nxdt_align.named_tensors import WeightSource
from nxdt_align.weights.digests import FileDigest, write_record
from nxdt_align.weights.extents import BLOCK, Extent, WeightsError, byte_view, empty, write_bytes
from nxdt_align.weights.generation import GENERATION
from nxdt_align.weights.hf_writer import CONFIG, config_json, write_json
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.nxdt_files import DONE, INFO, MODEL, TAG, TENSORS, shard_name
from nxdt_align.weights.tensor_files import REFERENCE_MODULE, REFERENCE_NAME, read_index, tensors_of

_UNFINISHED_MODEL = "model.partial"
_MARK = "1"
_Local = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a local tensor."""


@dataclass(frozen=True)
class _Place:
    """A weight's part of one rank's tensor: from ``first_row`` on."""

    rank: int
    extent: Extent
    first_row: int


class NxDTWriter:
    """The shards of one checkpoint, a folder that NxD Training's ``resume_from_checkpoint`` takes. Without
    ``finish`` its shards lie in a folder that nothing loads.

    Args:
        folder: the checkpoint's; must not hold files of another layout.
        dtype: the dtype of each weight, by the plain model's name.
        generation: of generation_config.json, which NxD Training ignores and an export brings along; None
            writes none.
    """

    def __init__(
        self,
        folder: Path,
        partition: Partition,
        dtype: Callable[[str], torch.dtype],
        *,
        generation: Mapping[str, Any] | None = None,
        xser: bool = False,
    ) -> None:
        self.folder = folder
        self._shards = folder / _UNFINISHED_MODEL
        self.partition = partition
        self._dtype = dtype
        self._generation = generation
        self._xser = xser
        self._places: dict[str, list[_Place]] = {}
        self._parts: dict[Path, dict[int, tuple[int, int]]] = {}
        """File -> offset of a share -> its bytes and CRC-32."""
        self._noted: set[str] = set()
        """Weights whose shares are among them."""
        self._lock = threading.Lock()

    def total_bytes(self) -> int:
        """Of the tensors in all files."""
        stages = range(self.partition.pp)
        each = [Extent(Path(), 0, d, s).nbytes for p in stages for s, d in self._specs(p).values()]
        return self.partition.tp * sum(each)

    def create(self) -> None:
        """Create every file at full size, as sparse files."""
        self._shards.mkdir(parents=True, exist_ok=True)
        for stage in range(self.partition.pp):
            specs = self._specs(stage)
            for rank in range(self.partition.tp):
                path = self._shards / shard_name(rank, stage)
                if not self._xser:
                    _create_plain(path, specs)
                elif rank == 0:
                    _create_xser(path, specs)
                else:
                    self._copy_xser(self._shards / shard_name(0, stage), path)

    def open(self) -> None:
        """Locate the tensors in the files of ``create``, also in those of an earlier attempt."""
        for stage in range(self.partition.pp):
            first = self._extents(self._shards / shard_name(0, stage))
            for rank in range(self.partition.tp):
                path = self._shards / shard_name(rank, stage)
                if self._xser:
                    folder = path.with_name(path.name + TENSORS)
                    extents = {n: replace(held, path=folder / held.path.name) for n, held in first.items()}
                else:
                    extents = self._extents(path) if rank else first
                for local, names in local_tensors(self.partition, stage).items():
                    row = 0
                    for name in names:
                        self._places.setdefault(name, []).append(_Place(rank, extents[local], row))
                        row += self.partition.local_shape(name)[0]

    def write(self, name: str, whole: Tensor) -> None:
        """Write a weight's share on every rank. Raises OSError. The vocabulary's padding stays 0."""
        for target in [name, *([HEAD] if name == EMBEDDING and self._is_tied else [])]:
            spare = empty(self.partition.local_shape(target), whole.dtype)
            for place in self._places[target]:
                for path, offset, share in self._shares(target, whole, place, spare):
                    write_bytes(path, offset, share)
                    # Of the memory, not of the file, so that the checksum detects what the disk has changed.
                    self._note_part(path, offset, share.nbytes, zlib.crc32(byte_view(share)))
        self._noted.add(name)

    @property
    def _is_tied(self) -> bool:
        return self.partition.config.tie_word_embeddings

    def _shares(
        self, name: str, whole: Tensor, place: _Place, spare: Tensor
    ) -> Iterator[tuple[Path, int, Tensor]]:
        """File, offset and content of what a rank holds of a weight."""
        dim, ranges = self.partition.ranges(name, place.rank)
        extent = place.extent
        if dim == 1:
            torch.cat([whole[:, start:stop] for start, stop in ranges], dim=1, out=spare)
            yield extent.path, extent.offset, spare
            return
        row = place.first_row
        for start, stop in ranges:
            rows = whole[start : min(stop, len(whole))]
            if len(rows):
                yield extent.path, extent.offset + row * extent.row_bytes, rows
            row += stop - start

    def _note_part(self, path: Path, offset: int, size: int, crc: int) -> None:
        with self._lock:
            self._parts.setdefault(path, {})[offset] = size, crc

    def _note_earlier_parts(self) -> None:
        """Of weights that an earlier attempt wrote, from the files: those are verified by then."""
        shapes = weight_shapes(self.partition.config)
        for target, places in self._places.items():
            name = EMBEDDING if self._is_tied and target == HEAD else target
            if name in self._noted:
                continue
            whole = torch.empty(shapes[name], dtype=self._dtype(name), device="meta")
            spare = torch.empty(self.partition.local_shape(target), dtype=whole.dtype, device="meta")
            for place in places:
                for path, offset, share in self._shares(target, whole, place, spare):
                    self._note_part(path, offset, share.nbytes, crc32_of(path, [(offset, share.nbytes)]))

    def _specs(self, stage: int) -> dict[str, _Local]:
        """The stage's local tensors, the same on every rank."""
        found = {}
        for local, names in local_tensors(self.partition, stage).items():
            shape = list(self.partition.local_shape(names[0]))
            shape[0] = sum(self.partition.local_shape(name)[0] for name in names)
            dtypes = {self._dtype(EMBEDDING if self._is_tied and n == HEAD else n) for n in names}
            if len(dtypes) > 1:
                kinds = " and ".join(sorted(str(dtype) for dtype in dtypes))
                raise WeightsError(
                    f"{' and '.join(names)} become one tensor, {local}, but are {kinds}; choose one: --dtype"
                )
            found[local] = (tuple(shape), dtypes.pop())
        return found

    def _extents(self, path: Path) -> dict[str, Extent]:
        found = {}
        for name, held in tensors_of(path, read_index(path)).items():
            if not isinstance(held, Extent):
                held = read_index(path.with_name(path.name + TENSORS) / f"tensor_{held.tid}.pt")
            assert isinstance(held, Extent)
            found[name] = held
        return found

    def _copy_xser(self, first: Path, path: Path) -> None:
        """Another rank's files: those of rank 0, which have the same names, sizes and places."""
        folder = path.with_name(path.name + TENSORS)
        folder.mkdir(exist_ok=True)
        for extent in self._extents(first).values():
            _copy_without_bytes(extent, folder / extent.path.name)
        shutil.copyfile(first.with_name(first.name + INFO), path.with_name(path.name + INFO))
        write_references(path, list(self._extents(first)))

    def reopen(self) -> WeightSource:
        """A reader of what was written."""
        return NxDTFolder(self.folder, self.partition.config, shards=self._shards)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Complete the folder; ``done``, which marks it as complete, is written last."""
        self._note_earlier_parts()
        files = {f: FileDigest.of(f, self._parts.get(f)) for f in self._shards.rglob("*") if f.is_file()}
        named = {f"{MODEL}/{f.relative_to(self._shards).as_posix()}": x for f, x in files.items()}
        os.rename(self._shards, self.folder / MODEL)
        write_json(self.folder / CONFIG, config_json(self.partition.config, self._dtype("model.norm.weight")))
        if self._generation is not None:
            write_json(self.folder / GENERATION, self._generation)
        beside = [self.folder / name for name in (CONFIG, GENERATION)]
        named |= {file.name: FileDigest.of(file) for file in beside if file.is_file()}
        named |= {name: FileDigest(len(_MARK), zlib.crc32(_MARK.encode())) for name in (TAG, DONE)}
        write_record(self.folder, record, named)
        # As neuronx_distributed.trainer.save_checkpoint: the tag file, then done.
        (self.folder / TAG).write_text(_MARK)
        (self.folder / DONE).write_text(_MARK)

    def unfinish(self) -> None:
        """Undo an interrupted ``finish``."""
        for name in (DONE, TAG):
            (self.folder / name).unlink(missing_ok=True)
        if (self.folder / MODEL).exists():
            os.rename(self.folder / MODEL, self._shards)

    def description(self) -> dict[str, Any]:
        """Identifies the output, to compare two conversions."""
        return {"layout": "nxdt", "xser": self._xser, **asdict(self.partition)}


def _create_plain(path: Path, specs: Mapping[str, _Local]) -> None:
    with FakeTensorMode():
        fake = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in specs.items()}
    _save_without_bytes(fake, path)


def _create_xser(path: Path, specs: Mapping[str, _Local]) -> None:
    folder = path.with_name(path.name + TENSORS)
    folder.mkdir(exist_ok=True)
    info = {}
    for tid, (shape, dtype) in enumerate(specs.values()):
        with FakeTensorMode():
            fake = torch.empty(shape, dtype=dtype)
        _save_without_bytes(fake, folder / f"tensor_{tid}.pt")
        info[tid] = {"dtype": dtype, "shape": torch.Size(shape), "expert_model_parallel": False}
    torch.save(info, path.with_name(path.name + INFO))
    write_references(path, list(specs))


def _save_without_bytes(content: Any, path: Path) -> None:
    # torch aligns storages to 64 bytes; whole blocks can be written with O_DIRECT.
    usual = serialization.config.save.storage_alignment
    serialization.config.save.storage_alignment = BLOCK
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, path)
    finally:
        serialization.config.save.storage_alignment = usual


def _copy_without_bytes(extent: Extent, path: Path) -> None:
    """Copy a file, leaving a hole instead of its tensor's bytes."""
    end = extent.offset + extent.nbytes
    with open(extent.path, "rb") as source, open(path, "wb") as target:
        target.write(source.read(extent.offset))
        source.seek(end)
        target.seek(end)
        target.write(source.read())


def write_references(path: Path, names: list[str]) -> None:
    """A torch.save file of {name: TensorReference(its position)}, as torch_xla's ``xser.save`` leaves it.

    Written opcode by opcode (pickle protocol 2), since torch_xla, whose class it is, need not be installed.
    """
    text = f"c{REFERENCE_MODULE}\n{REFERENCE_NAME}\n".encode()
    parts = [b"\x80\x02}("]
    for tid, name in enumerate(names):
        key = name.encode()
        parts.append(b"X" + len(key).to_bytes(4, "little") + key)
        parts.append(text + b")\x81}X\x03\x00\x00\x00tidJ" + tid.to_bytes(4, "little") + b"sb")
    parts.append(b"u.")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in (("data.pkl", b"".join(parts)), ("byteorder", b"little"), ("version", b"3\n")):
            # ZipInfo has a fixed time, so that the same weights give the same file.
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{record}"), content)
