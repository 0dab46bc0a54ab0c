"""Checkpoints of the native engine written weight by weight: the engine's own code reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_fixture import CONFIG, DOWN, fresh, run, same_folders
from torch import Tensor, nn

from nxdt_align.engines.native.checkpoint import checkpoint_step, describe, load, read_extra
from nxdt_align.engines.native.saving import save
from nxdt_align.errors import UserError
from nxdt_align.run.conversion import open_weights
from nxdt_align.run.native_writer import NativeWriter
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf_writer import write_hf_folder


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", CONFIG, fresh(CONFIG, 0, torch.bfloat16))
    return tmp_path / "hf"


def zeros() -> list[tuple[str, nn.Parameter]]:
    return [(n, nn.Parameter(torch.zeros_like(w))) for n, w in fresh(CONFIG, 0, torch.bfloat16).items()]


def test_the_engine_reads_what_is_written_bit_for_bit(hf: Path, tmp_path: Path) -> None:
    report = run(hf, tmp_path / "out", to="native")
    assert report.verified and report.weights == len(fresh(CONFIG))
    parameters, weights = zeros(), fresh(CONFIG, 0, torch.bfloat16)
    assert load(tmp_path / "out", parameters, None) == {}
    assert all(torch.equal(parameter, weights[name]) for name, parameter in parameters)
    assert checkpoint_step(tmp_path / "out") == 0 and read_extra(tmp_path / "out") == {}


def test_it_describes_itself_as_one_that_the_engine_writes(hf: Path, tmp_path: Path) -> None:
    run(hf, tmp_path / "out", to="native")
    parameters = zeros()
    load(tmp_path / "out", parameters, None)
    save(tmp_path / "saved", parameters, None, {})
    ours, theirs = describe(tmp_path / "out"), describe(tmp_path / "saved")
    assert ours.pop("bytes") > 0 and theirs.pop("bytes") > 0
    assert ours == theirs


def test_dtype_on_request_and_from_shards(hf: Path, tmp_path: Path) -> None:
    run(hf, tmp_path / "nxdt", tp=4, kv_multiplier=2)
    run(tmp_path / "nxdt", tmp_path / "out", to="native", dtype="fp32")
    assert describe(tmp_path / "out")["dtypes"] == ["float32"]
    run(tmp_path / "out", tmp_path / "back", dtype="bf16")
    same_folders(hf, tmp_path / "back")


def test_an_interrupted_one_goes_on_and_is_no_checkpoint(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = NativeWriter.write, 0

    def failing(self: NativeWriter, name: str, whole: Tensor) -> None:
        nonlocal written
        if written == 7:
            (self._tensors / self._file(name)).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        written += 1
        write(self, name, whole)

    with monkeypatch.context() as patch, pytest.raises(WeightsError, match=r"disk is full.*--resume"):
        patch.setattr(NativeWriter, "write", failing)
        run(hf, tmp_path / "out", to="native", workers=1)
    (left,) = tmp_path.glob(".out*")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        open_weights(left, hf / "config.json")
    assert run(hf, tmp_path / "out", to="native", resume=True).resumed == 7
    run(tmp_path / "out", tmp_path / "back")
    same_folders(hf, tmp_path / "back")


def test_what_the_disk_has_changed_is_found(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = NativeWriter.write

    def flipping(self: NativeWriter, name: str, whole: Tensor) -> None:
        write(self, name, whole)
        if name == DOWN:
            file = self._tensors / self._file(name)
            content = file.read_bytes()
            at = content.index(whole.view(torch.uint8).numpy().tobytes())
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])

    monkeypatch.setattr(NativeWriter, "write", flipping)
    with pytest.raises(UserError, match=r"cannot be read back: .*checksum"):
        run(hf, tmp_path / "out", to="native")
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]
