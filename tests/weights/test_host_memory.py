"""Memory given out again and again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nxdt_align.weights.host_memory import empty, reused_memory

MB = 1 << 20


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (1024, 1024), (3, 5, MB)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_are_what_was_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with reused_memory(8 * MB):
        for tensor in (empty(shape, dtype), empty(shape, dtype)):
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()


def test_a_block_takes_the_memory_of_the_one_before() -> None:
    places = []
    for _ in range(2):
        with reused_memory(8 * MB):
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
        with reused_memory(4 * MB):
            tensor = empty((2 * MB,), torch.int8).fill_(value)
            return all(bool((tensor == value).all()) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))
