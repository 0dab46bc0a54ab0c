"""Checkpoints of the native engine: exact, and known for what they are."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_checkpoint_fixture import (
    Net,
    adamw,
    as_earlier_version,
    assert_same,
    parameters,
    train,
    trained,
    write,
)

from nxdt_align.engines.checkpoint_folder import CheckpointError, to_plain
from nxdt_align.engines.native.checkpoint import (
    NativeCheckpoint,
    checkpoint_step,
    describe,
    is_checkpoint,
    load,
)
from nxdt_align.engines.native.saving import save


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path)


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
    as_earlier_version(written)
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
