"""State that four processes share: written by any layout of ranks, read by any other, exact."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import state_ranks
import torch
from state_ranks import BIG, adamw, assert_equal, big_weight, named, run_ranks, state_of, trained, whole
from torch import nn

from nxdt_align.engines.native.checkpoint import NativeCheckpoint, describe, load
from nxdt_align.engines.native.saving import save
from nxdt_align.models.presets import weight_shapes
from nxdt_align.weights.hf_writer import write_hf_folder

WORKS = (
    state_ranks.gather,
    state_ranks.reshard,
    state_ranks.stages,
    state_ranks.failures,
    state_ranks.background,
    state_ranks.memory,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[..., None]], Path]:
    """Run all of WORKS in one set of processes, which take seconds to start. Returns what gives the
    folder once a work is done, and fails where it is not."""
    folder = tmp_path_factory.mktemp("ranks")
    net, optimizer = trained(2)
    save(folder / "one", named(net), optimizer, {"global_step": 2})
    big = {name: big_weight(name) for name in weight_shapes(BIG)}
    write_hf_folder(folder / "big-hf", BIG, big)
    save(folder / "big-native", [(n, nn.Parameter(t, requires_grad=False)) for n, t in big.items()], None, {})
    error: Exception | None = None
    try:
        run_ranks(WORKS, folder)
    except Exception as raised:
        error = raised

    def folder_of(work: Callable[..., None]) -> Path:
        if not (folder / f"done-{work.__name__}").exists():
            pytest.fail(f"{work.__name__} was not done: {error}")
        return folder

    return folder_of


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """In one process, weights and AdamW's state."""
    net = whole(9)
    fresh = adamw(net)
    load(folder, named(net), fresh)
    source = NativeCheckpoint(folder)
    assert_equal({name: source.read(name) for name in source.names()}, state_of(net))
    return state_of(net, fresh)


def test_every_layout_reads_every_other(done: Callable[..., Path], tmp_path: Path) -> None:
    folder = done(state_ranks.reshard)
    assert_equal(read_back(folder / "tp2dp2"), state_of(*trained(3)))
    assert_equal(read_back(folder / "dp4"), state_of(*trained(5)))
    net, optimizer = trained(3)
    save(tmp_path / "same", named(net), optimizer, {})
    fingerprints = {NativeCheckpoint(f).fingerprint() for f in (tmp_path / "same", folder / "tp2dp2")}
    assert len(fingerprints) == 1


def test_what_a_sharded_folder_says_of_itself(done: Callable[..., Path]) -> None:
    folder = done(state_ranks.reshard) / "dp4"
    about = describe(folder)
    shards = sorted(f.name for f in (folder / "tensors").iterdir() if f.suffix == ".distcp")
    assert len(shards) == 4, "every rank writes"
    sizes = [f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != "checkpoint.json"]
    wanted = {"step": 5, "parameters": 117, "dtypes": ["float32"], "has_optimizer": True}
    assert about == wanted | {"bytes": sum(sizes)}


def test_pipeline_stages_bring_their_own(done: Callable[..., Path]) -> None:
    assert_equal(read_back(done(state_ranks.stages) / "stages"), state_of(*trained(3)))


def test_whole_weights_meet_on_rank_0(done: Callable[..., Path]) -> None:
    done(state_ranks.gather)


def test_a_fault_of_one_rank_is_every_rank_s(done: Callable[..., Path]) -> None:
    done(state_ranks.failures)


def test_training_goes_on_while_a_checkpoint_is_written(done: Callable[..., Path]) -> None:
    assert_equal(read_back(done(state_ranks.background) / "after"), state_of(*trained(5)))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory")
def test_a_rank_holds_its_part_and_at_most_one_tensor(done: Callable[..., Path]) -> None:
    done(state_ranks.memory)
