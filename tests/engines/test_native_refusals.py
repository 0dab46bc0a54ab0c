"""Checkpoints that the native engine refuses to read: the message is clear about what is wrong."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import flip
from native_checkpoint_fixture import (
    SHARD,
    Net,
    adamw,
    as_earlier_version,
    assert_same,
    parameters,
    trained,
    write,
)
from torch import nn

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.checkpoint_folder import CheckpointError
from nxdt_align.engines.native.checkpoint import NativeCheckpoint, checkpoint_step, is_checkpoint, load
from nxdt_align.engines.native.saving import save
from nxdt_align.errors import UserError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path)


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


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_one_flipped_bit_of_the_index(written: Path, at: float) -> None:
    """A pickle, which may read as one of another tensor."""
    flip(written / "tensors" / ".metadata", at)
    changed = "is damaged: tensors/.metadata: its bytes have changed since it was written"
    expect_refusal(written, changed)
    with pytest.raises(CheckpointError, match=changed):
        NativeCheckpoint(written)


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
    as_earlier_version(written)
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
        r"  missing: more\n  surplus: norm\n"
        r"  low must be torch.float32, but is torch.bfloat16\n"
        r"  weight must have shape \[4, 2\], but has \[4, 3\]\n",
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
