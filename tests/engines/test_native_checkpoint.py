"""Checkpoints of the native engine: exact, whole or not there, and clear about what is wrong."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.checkpoint import (
    NativeCheckpoint,
    checkpoint_step,
    describe,
    is_checkpoint,
    load,
)
from nxdt_align.engines.native.saving import save
from nxdt_align.engines.plain import to_plain
from nxdt_align.engines.summary import CheckpointError
from nxdt_align.errors import UserError

REPO = Path(__file__).parents[2]
SHARD = "tensors/__0_0.distcp"


class Net(nn.Module):
    def __init__(self, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, width, generator=generator))
        self.low = nn.Parameter(torch.randn(5, generator=generator).to(torch.bfloat16))
        self.norm = nn.Parameter(torch.tensor(1.5))


def parameters(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(net.named_parameters())


def adamw(net: nn.Module) -> torch.optim.AdamW:
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 0.0}, {"params": decayed}]
    return torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def trained(steps: int = 3) -> tuple[Net, torch.optim.AdamW]:
    net = Net()
    optimizer = adamw(net)
    train(net, optimizer, steps)
    return net, optimizer


def assert_same(left: Any, right: Any) -> None:
    """Equal in type, dtype and every bit."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert left.reshape(-1).view(torch.uint8).equal(right.reshape(-1).view(torch.uint8))
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    net, optimizer = trained()
    folder = tmp_path / "step=3"
    save(folder, parameters(net), optimizer, {"global_step": 3})
    return folder


# Exactness


def test_round_trip_is_exact_and_training_goes_on_equal(tmp_path: Path) -> None:
    net, optimizer = trained()
    save(tmp_path / "c", parameters(net), optimizer, {"global_step": 3})
    other = Net(seed=9)
    fresh = adamw(other)
    load(tmp_path / "c", parameters(other), fresh)
    assert_same(dict(net.state_dict()), dict(other.state_dict()))
    assert_same(optimizer.state_dict(), fresh.state_dict())
    for model, optim in ((net, optimizer), (other, fresh)):
        train(model, optim, 2, seed=5)
    assert_same(dict(net.state_dict()), dict(other.state_dict()))
    assert_same(optimizer.state_dict(), fresh.state_dict())


def test_fp32_state_of_bf16_weights_stays_fp32(tmp_path: Path) -> None:
    """torch's own load_state_dict would cast it to bf16."""
    net, optimizer = trained()
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[net.low][name] = torch.full((5,), 1 / 3)
    save(tmp_path / "c", parameters(net), optimizer, {})
    other = Net()
    fresh = adamw(other)
    load(tmp_path / "c", parameters(other), fresh)
    assert_same(fresh.state[other.low]["exp_avg"], torch.full((5,), 1 / 3))


def test_special_bits(tmp_path: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.weight[0] = torch.tensor([float("nan"), float("-inf"), -0.0])
        net.low[0] = 1e-40
    save(tmp_path / "c", parameters(net), None, {})
    other = Net(seed=3)
    load(tmp_path / "c", parameters(other), None)
    assert_same(dict(net.state_dict()), dict(other.state_dict()))


def test_state_that_is_no_tensor_and_views(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 1)
    optimizer.state[net.weight]["count"] = 7
    optimizer.state[net.weight]["view"] = torch.arange(12.0).reshape(3, 4).t()
    save(tmp_path / "c", parameters(net), optimizer, {})
    other = Net()
    fresh = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.0)
    load(tmp_path / "c", parameters(other), fresh)
    state = fresh.state[other.weight]
    assert state["count"] == 7 and fresh.param_groups[0]["lr"] == 0.1
    assert state["view"].equal(torch.arange(12.0).reshape(3, 4).t())
    assert_same(state["momentum_buffer"], optimizer.state[net.weight]["momentum_buffer"])


def test_optimizer_before_its_first_step(tmp_path: Path) -> None:
    net = Net()
    save(tmp_path / "c", parameters(net), adamw(net), {})
    fresh = adamw(net)
    load(tmp_path / "c", parameters(net), fresh)
    assert not fresh.state


def test_extra_comes_back(tmp_path: Path) -> None:
    extra: dict[Any, Any] = {
        "global_step": 12,
        "loops": {"fit_loop": {"state_dict": {}, "done": [1, 2.5, True, None, "x"]}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'step'}": {"best": torch.tensor(0.25), "inf": float("inf")}
        },
        "betas": (0.9, 0.95),
        7: b"bytes",
    }
    save(tmp_path / "c", parameters(Net()), None, extra)
    assert_same(load(tmp_path / "c", parameters(Net()), None), extra)


def test_extra_becomes_plain() -> None:
    """Subclasses and NumPy numbers keep their value; a view does not keep its storage."""
    row = torch.zeros(1000, 10)[3]
    plain = to_plain(
        {"a": np.float32(0.5), "b": np.int64(3), "c": Path("x"), "d": OrderedDict(e=np.bool_(True)), "f": row}
    )
    assert_same({k: v for k, v in plain.items() if k != "f"}, {"a": 0.5, "b": 3, "c": "x", "d": {"e": True}})
    assert plain["f"].untyped_storage().nbytes() == 40


@pytest.mark.parametrize("value", [object(), np.zeros(2), lambda: 0, {"deep": [object()]}])
def test_extra_that_is_not_plain_is_refused_at_save(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"extra\.callbacks\.mine.* is a (builtins|numpy)\."):
        save(tmp_path / "c", parameters(Net()), None, {"callbacks": {"mine": value}})
    assert list(tmp_path.iterdir()) == []


# What is there


def test_describe_and_step(written: Path, tmp_path: Path) -> None:
    about = describe(written)
    assert about.pop("bytes") > 3000
    wanted = {"step": 3, "parameters": 18, "dtypes": ["bfloat16", "float32"], "has_optimizer": True}
    assert about == wanted
    assert is_checkpoint(written) and checkpoint_step(written) == 3
    assert not is_checkpoint(tmp_path) and checkpoint_step(tmp_path / "none") is None


def test_names_on_disk_are_those_of_the_weights(written: Path) -> None:
    """Another layout of ranks finds optimizer state by the weight's name, not by its number."""
    from nxdt_align.engines.native.tensors import TensorFolder

    names = TensorFolder(written / "tensors").names()
    assert {"model.weight", "optimizer.weight.exp_avg", "optimizer.norm.step"} <= set(names)


def test_tensors_that_dcp_itself_has_written(written: Path) -> None:
    """As folders of earlier versions are, and as other tools write and read them."""
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
    from torch.distributed.checkpoint import load as dcp_load
    from torch.distributed.checkpoint import save as dcp_save

    net, optimizer = trained()
    tensors = {f"model.{name}": p.detach() for name, p in parameters(net)}
    for name, p in parameters(net):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    blank = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp_load(blank, storage_reader=FileSystemReader(written / "tensors"), no_dist=True)
    assert_same(dict(sorted(blank.items())), dict(sorted(tensors.items())))

    shutil.rmtree(written / "tensors")
    dcp_save(tensors, storage_writer=FileSystemWriter(written / "tensors"), no_dist=True)
    summary = json.loads((written / "checkpoint.json").read_text())
    for name in ("tensors/.metadata", SHARD):
        summary["files"][name] = (written / name).stat().st_size
    (written / "checkpoint.json").write_text(json.dumps(summary))
    other = Net(seed=9)
    fresh = adamw(other)
    load(written, parameters(other), fresh)
    assert_same(dict(net.state_dict()), dict(other.state_dict()))
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert_same(optimizer.state[mine], fresh.state[theirs])


def test_native_checkpoint_is_a_source_of_weights(written: Path) -> None:
    net, _ = trained()
    source = NativeCheckpoint(written)
    assert sorted(source.names()) == ["low", "norm", "weight"]
    for name, parameter in parameters(net):
        assert source.shape(name) == tuple(parameter.shape)
        assert_same(source.read(name), parameter.detach())


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    net = Net()
    for name in ("a", "b"):
        save(
            tmp_path / name, parameters(net), adamw(net) if name == "a" else None, {"global_step": len(name)}
        )
    with torch.no_grad():
        net.low[4] = -net.low[4]
    save(tmp_path / "c", parameters(net), None, {})
    a, b, c = (NativeCheckpoint(tmp_path / name).fingerprint() for name in "abc")
    assert a == b != c and len(a) == 32


# Whole or not at all


def test_overwriting(written: Path) -> None:
    net, optimizer = trained(steps=5)
    save(written, parameters(net), optimizer, {"global_step": 5})
    assert checkpoint_step(written) == 5
    assert [p.name for p in written.parent.iterdir()] == [written.name]


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "writable"), (errno.EROFS, "read-only")],
)
def test_folder_that_cannot_be_written(
    written: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    before = content(written.parent)

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    net, optimizer = trained(steps=5)
    for target in (written, written.with_name("step=5")):
        for owner, call in ((os, "fsync"), (Path, "mkdir")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, call, fail)
                with pytest.raises(UserError, match=rf"cannot write checkpoint {target}: .*{advice}"):
                    save(target, parameters(net), optimizer, {"global_step": 5})
            assert content(written.parent) == before
    assert checkpoint_step(written) == 3


FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from nxdt_align.engines.summary import CheckpointError
from nxdt_align.engines.native.saving import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
weight = nn.Parameter(torch.zeros(300_000))
try:
    save(Path(sys.argv[1]), [("weight", weight)], None, {"global_step": 9})
except CheckpointError as error:
    sys.exit(f"told: {error}")
"""


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs file size limits")
def test_write_that_really_fails_in_the_middle(written: Path) -> None:
    """The kernel refuses the bytes past a limit, as a full disk does."""
    before = content(written.parent)
    done = run_script(FILE_LIMIT, str(written))
    assert (
        done.returncode == 1 and f"told: cannot write checkpoint {written}: a file is larger" in done.stderr
    )
    assert content(written.parent) == before


KILLED = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from nxdt_align.engines.native import saving
def slow(*arguments):
    print("tensors written", flush=True)
    time.sleep(600)
saving._summary = slow
saving.save(Path(sys.argv[1]), [("weight", nn.Parameter(torch.zeros(10)))], None, {"global_step": 9})
"""


def test_sigkill_while_writing(written: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(written)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "tensors written\n"
    process.kill()
    process.wait()
    assert checkpoint_step(written) == 3
    others = [p for p in written.parent.iterdir() if p != written]
    assert len(others) == 1 and others[0].name.startswith(".")
    os.utime(others[0], (time.time() - 3600,) * 2)
    net, optimizer = trained()
    save(written.with_name("step=4"), parameters(net), optimizer, {"global_step": 4})
    assert sorted(p.name for p in written.parent.iterdir()) == ["step=3", "step=4"]


# Several ranks

RANK = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from nxdt_align.engines.native.checkpoint import load
from nxdt_align.engines.native.saving import save
from nxdt_align.engines.summary import CheckpointError
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", world_size=2, rank=rank)
named = [("weight", nn.Parameter(torch.arange(4.0)))]
try:
    save(folder / "bad", named, None, {"odd": object()})
except CheckpointError as error:
    assert "extra.odd" in str(error), error
else:
    sys.exit("no error")
save(folder / "good", named, None, {"global_step": 2})
fresh = [("weight", nn.Parameter(torch.zeros(4)))]
assert load(folder / "good", fresh, None) == {"global_step": 2} and fresh[0][1].equal(named[0][1])
dist.destroy_process_group()
"""


def test_two_ranks_write_one_and_fail_together(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    processes = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [p.wait(timeout=600) for p in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert checkpoint_step(tmp_path / "good") == 2 and not (tmp_path / "bad").exists()


# Faults on reading


def expect_refusal(folder: Path, match: str, net: nn.Module | None = None) -> None:
    net = net or Net(seed=4)
    before = {name: p.detach().clone() for name, p in parameters(net)}
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder, parameters(net), adamw(net))
    assert isinstance(caught.value, UserError) and isinstance(caught.value, EngineError)
    assert_same(before, {name: p.detach() for name, p in parameters(net)})


def test_missing_empty_and_foreign_folders(tmp_path: Path) -> None:
    expect_refusal(tmp_path / "none", "missing")
    (tmp_path / "empty").mkdir()
    expect_refusal(tmp_path / "empty", "the folder is empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("")
    expect_refusal(tmp_path / "other", "not a whole checkpoint of nxdt-align: .*; it holds model.safetensors")
    expect_refusal(tmp_path / "other" / "model.safetensors", "not a folder")


@pytest.mark.parametrize("name", [SHARD, "trainer.pt", "tensors/.metadata"])
@pytest.mark.parametrize("how", ["short", "gone"])
def test_incomplete(written: Path, name: str, how: str) -> None:
    path = written / name
    size = path.stat().st_size
    if how == "gone":
        path.unlink()
        what = "is missing"
    else:
        path.write_bytes(path.read_bytes()[:-10])
        what = f"has {size - 10} bytes instead of {size}"
    expect_refusal(written, rf"is incomplete: {name} {what}")
    assert checkpoint_step(written) is None and is_checkpoint(written)
    with pytest.raises(CheckpointError, match="incomplete"):
        NativeCheckpoint(written)


def test_without_its_summary(written: Path) -> None:
    (written / "checkpoint.json").unlink()
    expect_refusal(written, "checkpoint.json is missing")
    assert is_checkpoint(written) and checkpoint_step(written) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"format": "other", "version": 1}',
        '{"format": "nxdt-align native checkpoint", "version": 2}',
    ],
)
def test_summary_of_another_kind(written: Path, text: str) -> None:
    (written / "checkpoint.json").write_text(text)
    expect_refusal(written, "checkpoint.json is not one that this version reads")


@pytest.mark.parametrize("name", [SHARD, "trainer.pt", "tensors/.metadata"])
def test_garbage_of_the_right_size(written: Path, name: str) -> None:
    path = written / name
    path.write_bytes(b"\x80\x04garbage" + b"g" * (path.stat().st_size - 9))
    expect_refusal(written, "is damaged")


@pytest.mark.parametrize("name", [SHARD, "trainer.pt"])
def test_one_flipped_bit(written: Path, name: str) -> None:
    """torch reads a file whose bits have changed without a word: torch.load compares no checksum."""
    path = written / name
    content = bytearray(path.read_bytes())
    # In the middle of a value: of a weight, or of the trainer's state.
    at = content.find(trained()[0].weight.detach().numpy().tobytes()) if name == SHARD else None
    at = content.find(b"global_step") if at is None else at
    assert at > 0
    content[at + 5] ^= 1
    path.write_bytes(content)
    net = Net()
    with pytest.raises(CheckpointError, match=r"is damaged: .*the checksum of its record \S+ is wrong"):
        load(written, parameters(net), adamw(net))
    if name == SHARD:
        with pytest.raises(CheckpointError, match="is damaged"):
            NativeCheckpoint(written).read("weight")
        assert NativeCheckpoint(written).read("norm").equal(trained()[0].norm)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize("name", ["trainer.pt", "tensors/.metadata"])
def test_reading_executes_nothing(written: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written.parent)
    path = written / name
    if name == "trainer.pt":
        torch.save({"extra": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps(Evil()))
    summary = json.loads((written / "checkpoint.json").read_text())
    summary["files"][name] = path.stat().st_size
    (written / "checkpoint.json").write_text(json.dumps(summary))
    expect_refusal(written, r"is damaged: .*(something other than plain values|posix.system)")
    assert not (written.parent / "evil").exists()


def test_every_misfit_is_named(written: Path) -> None:
    net = Net(width=2)
    net.low = nn.Parameter(net.low.float())
    net.more = nn.Parameter(torch.zeros(1))
    del net.norm
    expect_refusal(
        written,
        r"does not fit the model \(4 tensors\):\n"
        r"  low is torch.bfloat16, but the model keeps torch.float32\n"
        r"  weight has shape \[4, 3\], but the model has \[4, 2\]\n"
        r"  missing: more\n  not in the model: norm\n",
        net,
    )


def test_no_optimizer_state(tmp_path: Path) -> None:
    save(tmp_path / "c", parameters(Net()), None, {})
    expect_refusal(tmp_path / "c", "no optimizer state; set model.weight_init_only: True")


def test_other_parameter_groups(written: Path) -> None:
    net = Net()
    with pytest.raises(EngineError, match=r"2 parameter groups, the present one 1.*divided otherwise"):
        load(written, parameters(net), torch.optim.AdamW(net.parameters()))
    with pytest.raises(EngineError, match="first norm"):
        load(written, parameters(net), torch.optim.AdamW([net.weight, net.low]))
