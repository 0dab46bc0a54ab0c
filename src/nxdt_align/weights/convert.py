"""Copies weights from a source to a destination, one by one, and verifies the result.

Several weights are in flight at once, within a budget of bytes, so that the memory in use does not grow with
the model.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from nxdt_align.errors import UserError
from nxdt_align.files import explain, flush_tree
from nxdt_align.named_tensors import WeightSource, summary
from nxdt_align.weights.direct_io import direct_transfers
from nxdt_align.weights.extents import WeightsError, byte_view, empty
from nxdt_align.weights.staging import Staging

log = logging.getLogger(__name__)
_WORKERS = 4
_BUDGET = 960 << 20
"""Bytes of memory for weights in flight; a larger weight is copied alone."""
_SLACK = 64 << 20
"""Bytes of disk space for everything but weights."""
_CHUNK = 1 << 24


class Writer(Protocol):
    """One kind of folder: takes whole weights in any order and from several threads."""

    def total_bytes(self) -> int: ...

    def create(self) -> None:
        """Create the files before the first weight."""
        ...

    def open(self) -> None:
        """Locate the tensors in the files of ``create``, also in those of an earlier attempt."""
        ...

    def write(self, name: str, whole: Tensor) -> None:
        """Write a weight. Raises OSError."""
        ...

    def reopen(self) -> WeightSource:
        """A reader of what was written."""
        ...

    def finish(self, record: Mapping[str, Any]) -> None:
        """Complete the folder; the last file written marks it as complete."""
        ...

    def unfinish(self) -> None:
        """Undo an interrupted ``finish``."""
        ...

    def description(self) -> dict[str, Any]:
        """Identifies the output, to compare two conversions; ``config`` is the model's shape."""
        ...


@dataclass(frozen=True)
class Report:
    """The result of a conversion."""

    weights: int
    bytes_written: int
    seconds: float
    nans: dict[str, int]
    """Weight -> NaN entries, where there are any."""
    verified: bool
    resumed: int
    """Number of weights that an earlier attempt had written."""


class Conversion:
    """One source and one folder.

    Args:
        make_writer: a writer into the folder that it is given.
        folder: to make, when it is whole.
        dtype: what weights are cast to; None keeps each as it is.
        workers: threads.
        quiet: no progress bar.
    """

    def __init__(
        self,
        source: WeightSource,
        make_writer: Callable[[Path], Writer],
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        resume: bool = False,
        verify: bool = True,
        workers: int | None = None,
        quiet: bool = False,
    ) -> None:
        assert source.path is not None, "weights that are drawn need no conversion"
        self._path = source.path
        self._source, self._make_writer, self._folder = source, make_writer, folder
        self._dtype, self._resume, self._verify = dtype, resume, verify
        self._workers = workers or _WORKERS
        self._quiet = quiet

    def run(self) -> Report:
        """Convert, verify and publish.

        Raises UserError. After an interruption or a full disk, the files are kept for ``resume``, under a
        name that no loader accepts.
        """
        began = time.monotonic()
        with Staging(self._folder, self._identity(), resume=self._resume) as staging:
            writer = self._make_writer(staging.folder)
            self._require_space(staging, writer.total_bytes())
            try:
                earlier = len(staging.checksums)
                self._write(staging, writer)
                # After a crash, an earlier process's writes may not have reached the device: always verify.
                if self._verify or staging.resumed:
                    self._check(staging, writer)
                flush_tree(staging.folder)  # before the marker of completeness is
                writer.finish(self._record(staging, writer))
                staging.publish()
            except UserError:  # resuming would fail in the same way
                staging.discard()
                raise
            except KeyboardInterrupt:
                log.warning("interrupted: call again with --resume to continue, or remove %s", staging.folder)
                raise
            except OSError as error:
                raise WeightsError(
                    f"cannot write {self._folder}: {explain(error)}. What is written is kept in "
                    f"{staging.folder}; call again with --resume to continue, or remove it"
                ) from error
        nans = {name: count for name, count in staging.nans.items() if count}
        if nans:
            log.warning("%d NaN entries in %s", sum(nans.values()), ", ".join(summary(nans)))
        seconds = time.monotonic() - began
        return Report(
            len(staging.checksums),
            writer.total_bytes(),
            seconds,
            nans,
            self._verify or staging.resumed,
            earlier,
        )

    def _identity(self) -> dict[str, Any]:
        return {
            "source": str(self._path.absolute()),
            "files": _stamp(self._path),
            "dtype": str(self._dtype),
            "target": self._make_writer(Path()).description(),
        }

    def _record(self, staging: Staging, writer: Writer) -> dict[str, Any]:
        target = writer.description()
        config = target.pop("config")
        return {
            "made_from": str(self._source),
            **target,
            "vocab_size": config["vocab_size"],
            "dtypes": sorted({str(self._target_dtype(name)) for name in self._source.names()}),
            "crc32": dict(sorted(staging.checksums.items())),
        }

    def _require_space(self, staging: Staging, needed: int) -> None:
        missing = needed + _SLACK - staging.bytes_on_disk()
        free = shutil.disk_usage(staging.folder).free
        if free < missing:
            if not staging.resumed:
                staging.discard()
            raise WeightsError(
                f"the output takes {_gigabytes(missing)}, but {self._folder.absolute().parent} has "
                f"{_gigabytes(free)} free: free some space, or choose another folder"
            )

    def _write(self, staging: Staging, writer: Writer) -> None:
        if not staging.is_created:
            writer.create()
            staging.record_created()
        else:
            writer.unfinish()
        writer.open()
        lock = threading.Lock()

        def carry(name: str) -> None:
            tensor = self._source.read(name).contiguous()
            if tensor.dtype != self._target_dtype(name):
                tensor = cast_checked(name, tensor, self._target_dtype(name))
            writer.write(name, tensor)
            # Of the memory, not of the file, so that reading back detects corruption on disk.
            checksum, nans = zlib.crc32(byte_view(tensor)), count_nans(tensor)
            with lock:
                staging.record(name, checksum, nans)

        self._for_each("writing", [n for n in self._source.names() if n not in staging.checksums], carry)

    def _check(self, staging: Staging, writer: Writer) -> None:
        """Read every weight back, bypassing the page cache if possible, and compare checksums."""
        flush_tree(staging.folder)  # dirty pages cannot leave the cache
        for file in (f for f in staging.folder.rglob("*") if f.is_file()):
            _forget(file)
        wrong: list[str] = []

        def compare(name: str) -> None:
            tensor = written.read(name)
            as_meant = self._source.shape(name), self._target_dtype(name), staging.checksums[name]
            if (tuple(tensor.shape), tensor.dtype, zlib.crc32(byte_view(tensor))) != as_meant:
                wrong.append(name)

        try:
            written = writer.reopen()
            if sorted(written.names()) != sorted(self._source.names()):
                raise WeightsError(f"the names in {self._folder} are not those that were written")
            self._for_each("verifying", written.names(), compare)
        except UserError as error:
            raise WeightsError(f"what was written cannot be read back: {error}") from error
        if wrong:
            raise WeightsError(
                f"what was read back differs from what was written: {', '.join(summary(wrong))}. The disk or "
                "the memory is at fault; nothing is kept"
            )

    def _target_dtype(self, name: str) -> torch.dtype:
        return self._dtype or self._source.dtype(name)

    def _for_each(self, label: str, names: list[str], act: Callable[[str], None]) -> None:
        """Call ``act`` for all names, in threads; the first error stops the others."""
        budget, stop, own_threads = _Budget(_BUDGET), threading.Event(), torch.get_num_threads()
        torch.set_num_threads(1)  # our threads already use all cores
        sizes = {name: self._nbytes(name) for name in names}
        disable = True if self._quiet else None
        with (
            tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=label, disable=disable) as bar,
            ThreadPoolExecutor(self._workers) as pool,
        ):

            def guarded(name: str) -> None:
                # Twice: the weight, and a reordered copy of a share, which may be all of it.
                with budget.take(2 * sizes[name]), direct_transfers(_BUDGET // self._workers):
                    if not stop.is_set():
                        act(name)
                        bar.update(sizes[name])

            futures = [pool.submit(guarded, name) for name in names]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                torch.set_num_threads(own_threads)

    def _nbytes(self, name: str) -> int:
        return prod(self._source.shape(name)) * max(
            self._source.dtype(name).itemsize, self._target_dtype(name).itemsize
        )


class _Budget:
    """A semaphore of ``most`` bytes; a larger request is capped, so it runs alone."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._changed = threading.Condition()

    @contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        wanted = min(wanted, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= wanted)
            self._left -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._left += wanted
                self._changed.notify_all()


def cast_checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A row-major copy on the CPU. Raises WeightsError for a value that is too large for ``dtype``."""
    cast = empty(tensor.shape, dtype).copy_(tensor)
    if not (tensor.is_floating_point() and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max):
        return cast
    before, after = tensor.reshape(-1), cast.reshape(-1)
    for start in range(0, len(after), _CHUNK):
        part = slice(start, start + _CHUNK)
        lost = before[part][after[part].isinf() & ~before[part].isinf()]
        if len(lost):
            raise WeightsError(
                f"--dtype: {name} has values beyond the largest of {dtype} ({torch.finfo(dtype).max:g}), "
                f"such as {lost[0].item():g}; choose another, or leave it out to keep {tensor.dtype}"
            )
    return cast


def count_nans(tensor: Tensor) -> int:
    """Number of NaN entries. Tests the sum first, which is fast and NaN if any entry is."""
    if not tensor.is_floating_point():
        return 0
    flat = tensor.reshape(-1)
    if tensor.dtype.itemsize > 1 and not torch.isnan(flat.sum()):
        return 0
    count = 0
    for start in range(0, len(flat), _CHUNK):
        count += int(torch.isnan(flat[start : start + _CHUNK].float()).sum())
    return count


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of each file at ``path``, to detect a changed source."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _forget(file: Path) -> None:
    """Drop the file from the page cache, so that the next read comes from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
