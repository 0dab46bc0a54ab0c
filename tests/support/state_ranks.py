"""Four processes that share a model's state: what each of them does in the tests of sharded checkpoints.

Kept out of the test's own file, which a spawned process cannot import.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import causal_attention
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.checkpoint import NativeCheckpoint, load
from nxdt_align.engines.native.saving import Saver, save
from nxdt_align.engines.native.shards import LocalShard, fill, whole_tensors
from nxdt_align.engines.ranks import Ranks
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig, weight_shapes
from nxdt_align.models.sharding import split_of
from nxdt_align.weights.hf import HFFolder

RANKS = 4
SHAPES = {"col": (8, 6), "row": (6, 8), "norm": (6,), "uneven": (5, 3)}
"""``uneven`` over four ranks: 2, 2, 1 and 0 rows."""
SPLITS = {"col": Shard(0), "row": Shard(1), "norm": Replicate(), "uneven": Replicate()}
Named = list[tuple[str, nn.Parameter]]


def run_ranks(works: Sequence[Callable[[int, Path], None]], folder: Path) -> None:
    """Each ``work(rank, folder)`` in the same four processes, in turn; a file ``done-<work>`` appears after
    each. Raises what the first of them raises."""
    mp.spawn(_start, (works, folder), RANKS)


def _start(rank: int, works: Sequence[Callable[[int, Path], None]], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", world_size=RANKS, rank=rank)
    try:
        for work in works:
            work(rank, folder)
            dist.barrier()
            (folder / f"done-{work.__name__}").touch()
    finally:
        dist.destroy_process_group()


# A small model, whole or spread


def value(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sorted(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def whole(seed: int, names: Sequence[str] = tuple(SHAPES)) -> nn.Module:
    net = nn.Module()
    for name in names:
        net.register_parameter(name, nn.Parameter(value(name, seed)))
    return net


def spread(seed: int, *, tp: int, dp: int) -> nn.Module:
    """The same values, tensor parallel first and FSDP2 over that."""
    net = nn.Module()
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    for name, split in SPLITS.items():
        tensor = value(name, seed)
        if tp > 1:
            tensor = distribute_tensor(tensor, mesh["tp"], [split])
        net.register_parameter(name, nn.Parameter(tensor))
    if dp > 1:
        fully_shard(net, mesh=mesh["dp"])
    return net


def adamw(net: nn.Module) -> torch.optim.AdamW:
    """Two groups, as a run has them."""
    named = dict(net.named_parameters())
    groups = [[p for n, p in named.items() if (n == "norm") is spared] for spared in (False, True)]
    settings: list[dict[str, Any]] = [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in settings if g["params"]], lr=0.1, foreach=False)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Gradients that depend on the step alone; AdamW works on each entry by itself."""
    for step in steps:
        for name, parameter in net.named_parameters():
            parameter.grad = like(value(name, 50 + step), parameter)
        optimizer.step()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor``, whole, laid out as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return tensor
    local = tensor[LocalShard.of(parameter).region].clone()
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def gathered(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Weights and optimizer state, whole."""
    found = {}
    for name, parameter in net.named_parameters():
        found[name] = gathered(parameter)
        if optimizer is not None:
            found |= {f"{name}.{key}": gathered(t) for key, t in optimizer.state[parameter].items()}
    return found


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def trained(steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """In one process: what every layout is compared with."""
    net = whole(0)
    optimizer = adamw(net)
    train(net, optimizer, range(steps))
    return net, optimizer


def named(net: nn.Module) -> Named:
    return list(net.named_parameters())


# What the ranks do


def reshard(rank: int, folder: Path) -> None:
    """(tp 2, dp 2) -> disk -> dp 4 -> disk -> (tp 4); and what one process has written."""
    net = spread(0, tp=2, dp=2)
    assert any(placement.is_shard() for p in net.parameters() for placement in p.placements)
    assert_equal(state_of(net), state_of(whole(0)))
    optimizer = adamw(net)
    train(net, optimizer, range(3))
    save(folder / "tp2dp2", named(net), optimizer, {"global_step": 3, "of": "rank 0" if rank == 0 else "x"})

    other = spread(9, tp=1, dp=4)
    fresh = adamw(other)
    assert load(folder / "tp2dp2", named(other), fresh) == {"global_step": 3, "of": "rank 0"}
    assert_equal(state_of(other, fresh), state_of(*trained(3)))
    train(other, fresh, range(3, 5))
    save(folder / "dp4", named(other), fresh, {"global_step": 5})

    for source, steps in (("dp4", 5), ("one", 2)):
        net = spread(9, tp=4 if source == "dp4" else 2, dp=1 if source == "dp4" else 2)
        fresh = adamw(net)
        load(folder / source, named(net), fresh)
        assert_equal(state_of(net, fresh), state_of(*trained(steps)))
        moment = fresh.state[net.col]["exp_avg"]
        assert moment.placements == net.col.placements and moment.to_local().shape == net.col.to_local().shape
    train(net, fresh, range(2, 5))
    assert_equal(state_of(net, fresh), state_of(*trained(5)))


def stages(rank: int, folder: Path) -> None:
    """Two pipeline stages of two data-parallel ranks each: they hold different names."""
    mine = ("col", "norm") if rank < 2 else ("row", "uneven")
    net = whole(9, mine)
    fresh = adamw(net)
    load(folder / "one", named(net), fresh)
    wanted = state_of(*trained(2))
    assert_equal(state_of(net, fresh), {k: v for k, v in wanted.items() if k.split(".")[0] in mine})
    train(net, fresh, range(2, 3))
    save(folder / "stages", named(net), fresh, {"global_step": 3})

    misfit = whole(9, mine)
    if rank == 3:
        misfit.row = nn.Parameter(torch.zeros(6, 7))
    del misfit._parameters[mine[1]]
    for act in (
        lambda: load(folder / "one", named(misfit), None),
        lambda: fill(named(misfit), NativeCheckpoint(folder / "one")),
    ):
        text = fault(act)
        for part in ("surplus: norm", "surplus: uneven", "row must have shape [6, 7], but has [6, 8]"):
            assert part in text, text


def fault(act: Callable[[], object]) -> str:
    try:
        act()
    except EngineError as error:
        return str(error)
    raise AssertionError("no error")


def gather(rank: int, folder: Path) -> None:
    """Whole weights on rank 0, one at a time: of shards, and of stages that rank 0 has no part of."""
    mine = ("col", "norm") if rank < 2 else ("row", "uneven")
    low = nn.Parameter(torch.arange(4).to(torch.bfloat16))
    for net in (spread(0, tp=2, dp=2), spread(0, tp=1, dp=4), whole(0, mine)):
        held = [*named(net), ("low", low)] if rank == 3 or len(named(net)) == 4 else named(net)
        found = list(whole_tensors(held, Ranks.apart()))
        if rank:
            assert found == []
            continue
        assert [name for name, _ in found] == ["col", "low", "norm", "row", "uneven"]
        assert_equal(dict(found), state_of(whole(0)) | {"low": low.detach()})


def failures(rank: int, folder: Path) -> None:
    """One rank's fault is every rank's, in the same words, and leaves nothing behind."""
    net = spread(0, tp=2, dp=2)
    written = folder / "step=1"
    real = os.fsync
    if rank == 2:
        os.fsync = fail_with_full_disk
    texts: list[Any] = [None] * RANKS
    dist.all_gather_object(texts, fault(lambda: save(written, named(net), None, {})))
    os.fsync = real
    assert texts == [texts[0]] * RANKS and "the disk is full" in texts[0] and "on rank 2" in texts[0], texts
    assert "\n" not in texts[0]
    dist.barrier()
    assert [f.name for f in folder.iterdir() if "step" in f.name] == []

    is_dir = Path.is_dir
    if rank == 2:  # as on a node that does not share the storage
        Path.is_dir = lambda path: "nxdt-tmp" not in str(path) and is_dir(path)
    text = fault(lambda: save(written, named(net), None, {}))
    Path.is_dir = is_dir
    assert "must be on storage of all nodes" in text and "on rank 2" in text, text
    dist.barrier()
    assert [f.name for f in folder.iterdir() if "step" in f.name] == []

    text = fault(lambda: save(written, named(net), None, {"odd": object()} if rank == 0 else {}))
    assert "extra.odd" in text
    halves = DTensor.from_local(torch.zeros(2), net.col.device_mesh, [Partial()] * net.col.device_mesh.ndim)
    try:
        save(written, [("halves", nn.Parameter(halves))], None, {})
    except ValueError as error:
        assert "neither whole nor a box" in str(error)
    else:
        raise AssertionError("no error")


def background(rank: int, folder: Path) -> None:
    """Training goes on while a thread writes what was there; a fault is raised later, everywhere."""
    net, saver = spread(0, tp=2, dp=2), Saver()
    optimizer = adamw(net)
    train(net, optimizer, range(3))
    done: list[str] = []
    saver.save(folder / "early", named(net), optimizer, {"global_step": 3}, background=True)
    saver.then(lambda: done.append("early"))
    train(net, optimizer, range(3, 5))  # collectives of the optimizer's would meet the thread's here
    for parameter in net.parameters():
        gathered(parameter)
    saver.finish()
    assert done == ["early"]
    other = spread(9, tp=1, dp=4)
    fresh = adamw(other)
    load(folder / "early", named(other), fresh)
    assert_equal(state_of(other, fresh), state_of(*trained(3)))

    real = os.fsync
    if rank == 1:
        os.fsync = fail_with_full_disk
    saver.save(folder / "late", named(net), optimizer, {}, background=True)
    saver.then(lambda: done.append("late"))
    text = fault(lambda: saver.save(folder / "next", named(net), optimizer, {}, background=True))
    os.fsync = real
    assert "late: the disk is full" in text and "in the background" in text, text
    assert done == ["early"]
    saver.save(folder / "after", named(net), optimizer, {"global_step": 5}, background=True)
    saver.finish()
    saver.finish()
    dist.barrier()
    assert not (folder / "late").exists() and not (folder / "next").exists() and (folder / "after").exists()


def fail_with_full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# Memory

BIG = DecoderConfig(
    vocab_size=12000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=64,
)
"""190 MB in bf16; the largest tensors, embedding and head, are 25 MB each."""
M_MMAP_THRESHOLD = -3
"""The C library's: from this size on, what is freed goes back to the system at once."""


def big_weight(name: str) -> Tensor:
    """Any bits that differ from place to place."""
    shape = weight_shapes(BIG)[name]
    return torch.arange(prod(shape), dtype=torch.int16).view(torch.bfloat16).view(shape)


def memory(rank: int, folder: Path) -> None:
    """A model on the meta device, tensor parallel over four ranks, filled from one process's folders."""
    total = sum(2 * prod(shape) for shape in weight_shapes(BIG).values())
    largest = max(2 * prod(shape) for shape in weight_shapes(BIG).values())
    mesh = init_device_mesh("cpu", (RANKS,))
    # Else the C library keeps freed tensors, more or fewer from run to run.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    kept = []  # freed memory would be used again, and not be counted
    for source in (HFFolder(folder / "big-hf"), NativeCheckpoint(folder / "big-native")):
        with torch.device("meta"):
            decoder = Decoder(BIG, causal_attention).to(torch.bfloat16)
        for module_name, module in decoder.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                dim = split_of(f"{module_name}.{name}").dim
                placement = Replicate() if dim is None else Shard(dim)
                spread = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(spread))
        source.read("model.norm.weight")  # code that reads is in memory once, whatever it reads
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = from_status("VmRSS")
        decoder.to_empty(device="cpu")
        fill(decoder.named_parameters(), source)
        grown = from_status("VmHWM") - before
        assert 0.9 * total / 4 < grown < total / 4 + largest + (20 << 20), f"{source}: {grown >> 20} MiB"
        print(f"rank {rank}: {source}: peak {grown >> 20} MiB of {total >> 20}")
        kept.append(decoder)
        for name, parameter in decoder.named_parameters():
            held, wanted = parameter.to_local(), big_weight(name)[LocalShard.of(parameter).region]
            assert held.view(torch.int16).equal(wanted.contiguous().view(torch.int16)), name


def from_status(key: str) -> int:
    """Bytes. Weights are read by position and not mapped, so no page of a file is counted as memory."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024
