"""Bytes arrive whole whatever their place and length, past the cache and through it."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nxdt_align.weights import direct_io as direct
from nxdt_align.weights.direct_io import direct_transfers
from nxdt_align.weights.extents import BLOCK, Bytes, Transfers, empty

MB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    """At sizes at which a few bytes take every way: past the cache from one byte on, in chunks of two
    blocks."""
    monkeypatch.setattr(direct, "_LEAST", 1)
    monkeypatch.setattr(direct, "_CHUNK", 2 * BLOCK)
    return direct._DirectTransfers(BLOCK)


def random_bytes(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def at_block(size: int) -> Bytes:
    """Zeros that start at a multiple of BLOCK in memory."""
    memory = np.zeros(size + BLOCK, dtype=np.uint8)
    start = -memory.ctypes.data % BLOCK
    return memory[start : start + size]


PLACES = [(0, 1), (0, BLOCK), (BLOCK, 3 * BLOCK), (5, BLOCK), (BLOCK - 1, 2), (7, 5 * BLOCK + 3), (BLOCK, 9)]
PLACES += [
    (random.Random(i).randrange(9 * BLOCK), random.Random(-i).randrange(1, 7 * BLOCK)) for i in range(20)
]


def forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize(("offset", "size"), PLACES)
def test_bytes_are_read_from_any_place(
    small: Transfers, offset: int, size: int, is_cold: bool, tmp_path: Path
) -> None:
    content = random_bytes(20 * BLOCK + 11)
    (tmp_path / "file").write_bytes(content)
    for target in (at_block(size), at_block(size + 1)[1:]):
        if is_cold:
            forget(tmp_path / "file")
        assert small.read(tmp_path / "file", offset, target) == size
        assert np.array_equal(target, content[offset : offset + size])


@pytest.mark.parametrize(("offset", "size"), PLACES)
def test_bytes_are_written_to_any_place_and_nowhere_else(
    small: Transfers, offset: int, size: int, tmp_path: Path
) -> None:
    for shift in (0, 1):
        content, new = random_bytes(20 * BLOCK), at_block(size + 1)[shift : shift + size]
        new[:] = random_bytes(size, seed=1)
        (tmp_path / "file").write_bytes(content)
        small.write(tmp_path / "file", offset, new)
        content[offset : offset + size] = new
        assert (tmp_path / "file").read_bytes() == content.tobytes()


@pytest.mark.parametrize("is_cold", [False, True])
def test_a_file_that_ends_before_gives_what_it_has(small: Transfers, is_cold: bool, tmp_path: Path) -> None:
    content = random_bytes(3 * BLOCK + 5)
    for offset in (0, 7, BLOCK, 3 * BLOCK + 1, 3 * BLOCK + 5, 9 * BLOCK):
        (tmp_path / "file").write_bytes(content)
        if is_cold:
            forget(tmp_path / "file")
        target = at_block(8 * BLOCK)
        count = small.read(tmp_path / "file", offset, target)
        assert target[:count].tobytes() == content[offset:].tobytes()
        assert not target[count:].any()


def refuse(call: Callable[..., int], calls_let_through: int) -> Callable[..., int]:
    """``call``, which the system refuses for aligned transfers after the first few."""
    left = [calls_let_through]

    def refusing(descriptor: int, *arguments: Any) -> int:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EINVAL, "Invalid argument")
        return call(descriptor, *arguments)

    return refusing


@pytest.mark.parametrize("let_through", [0, 2])
def test_a_system_that_refuses_to_pass_by_the_cache_gets_it_through_the_cache(
    small: Transfers, let_through: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, found = random_bytes(11 * BLOCK + 1), at_block(11 * BLOCK + 1)
    (tmp_path / "file").write_bytes(bytes(len(content)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse(os.pwrite, let_through))
        small.write(tmp_path / "file", 0, content)
    forget(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse(os.preadv, let_through))
        assert small.read(tmp_path / "file", 0, found) == len(content)
    assert np.array_equal(found, content)


def test_a_file_system_without_direct_transfers_is_served(
    small: Transfers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def refusing(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_file(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    content, found = random_bytes(5 * BLOCK), at_block(5 * BLOCK)
    (tmp_path / "file").write_bytes(bytes(len(content)))
    small.write(tmp_path / "file", 0, content)
    assert small.read(tmp_path / "file", 0, found) == len(content)
    assert np.array_equal(found, content)


def test_other_errors_are_raised(small: Transfers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "pwrite", full)
        small.write(tmp_path / "file", 0, at_block(4 * BLOCK))
    with pytest.raises(FileNotFoundError):
        small.read(tmp_path / "none", 0, at_block(BLOCK))


@pytest.mark.parametrize(("cached", "expected"), [((0, 1, 2, 3), True), ((0, 1, 3), False), ((), False)])
def test_cached_is_what_is_cached_to_the_last_page(
    cached: tuple[int, ...], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was just downloaded is not read from the device again. Pages 1 to 4 of the file are asked for."""

    class System:
        @staticmethod
        def mincore(address: ctypes.c_void_p, length: ctypes.c_size_t, resident: ctypes.c_void_p) -> int:
            assert length.value == 3 * BLOCK + 7 and not (address.value or 0) % BLOCK
            for page in range(4):  # the other bits mean nothing
                ctypes.memset((resident.value or 0) + page, 0x80 | (page in cached), 1)
            return 0

    monkeypatch.setattr(direct, "_libc", System)
    (tmp_path / "file").write_bytes(bytes(6 * BLOCK))
    assert direct._is_cached(tmp_path / "file", BLOCK + 5, 3 * BLOCK + 2) is expected


def test_cached_bytes_are_seen_as_cached(tmp_path: Path) -> None:
    """So that what was just downloaded is not read from the device again."""
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * BLOCK))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert direct._is_cached(path, 5, 60 * BLOCK)
        assert not direct._is_cached(path, 0, 65 * BLOCK)
        forget(path)
        if not direct._is_cached(path, 5, 60 * BLOCK):  # tmpfs forgets nothing
            os.preadv(descriptor, [bytearray(BLOCK)], 0)
            assert not direct._is_cached(path, 0, 64 * BLOCK)
    finally:
        os.close(descriptor)


# Memory that is given out again and again


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (1024, 1024), (3, 5, MB)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_are_what_was_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with direct_transfers(8 * MB):
        for tensor in (empty(shape, dtype), empty(shape, dtype)):
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()


def test_a_block_takes_the_memory_of_the_one_before() -> None:
    places = []
    for _ in range(2):
        with direct_transfers(8 * MB):
            tensors = [empty((2 * MB,), torch.int8) for _ in range(6)]
            for value, tensor in enumerate(tensors):
                tensor.fill_(value)
            assert [int(t.unique()) for t in tensors] == list(range(6)), "they overlap"
            places.append([t.data_ptr() for t in tensors])
            assert all(not place % 4096 for place in places[-1])
    assert places[0][:4] == places[1][:4]
    assert empty((2 * MB,), torch.int8).data_ptr() not in places[0][:4]


def test_threads_do_not_share() -> None:
    def work(value: int) -> bool:
        with direct_transfers(4 * MB):
            tensor = empty((2 * MB,), torch.int8).fill_(value)
            return all(bool((tensor == value).all()) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))
