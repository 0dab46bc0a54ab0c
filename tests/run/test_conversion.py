"""``convert`` and ``export`` as Python calls them."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import CONFIG, fresh, same_folders

from nxdt_align.errors import UserError
from nxdt_align.run import conversion
from nxdt_align.run.conversion import convert, export
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.nxdt import NxDTFolder


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", CONFIG, fresh(CONFIG))
    return tmp_path / "hf"


def test_paths_are_text_or_paths_and_sizes_are_keywords(hf: Path, tmp_path: Path) -> None:
    report = convert(str(hf), str(tmp_path / "nxdt"), tp=4, kv_multiplier=2, pipeline_cuts=[1], quiet=True)
    assert report.weights == len(fresh(CONFIG)) and report.verified and not report.nans
    held = NxDTFolder(tmp_path / "nxdt", CONFIG).partition
    assert (held.tp, held.pp, held.cuts, held.kv_multiplier) == (4, 2, (1,), 2)
    export(str(tmp_path / "nxdt"), tmp_path / "back", config=str(hf / "config.json"), quiet=True)
    same_folders(hf, tmp_path / "back")


def test_export_reads_any_kind(hf: Path, tmp_path: Path) -> None:
    (hf / "tokenizer.json").write_text("{}")
    convert(hf, tmp_path / "native", to="native", quiet=True)
    export(tmp_path / "native", tmp_path / "out", dtype="bf16", tokenizer=str(hf), quiet=True)
    source, weights = HFFolder(tmp_path / "out"), fresh(CONFIG)
    assert all(torch.equal(source.read(name), weights[name].bfloat16()) for name in weights)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"to": "gguf"}, "to: must be one of hf, nxdt, native, but is 'gguf'"),
        ({"dtype": "int8"}, "dtype: must be one of bf16, fp16, fp32, but is 'int8'"),
        ({"tp": 0}, "tp: must be a whole number from 1, but is 0"),
        ({"workers": 0}, "workers: must be a whole number from 1"),
        ({"tp": 3}, "sizes that fit this model"),
    ],
)
def test_bad_values_are_user_errors(options: dict[str, Any], fault: str, hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault):
        convert(hf, tmp_path / "out", **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_both_are_typed_and_say_what_each_argument_is() -> None:
    """Of export's arguments, convert's page says what they are, and the defaults are the same."""
    wide, narrow = inspect.signature(convert).parameters, inspect.signature(export).parameters
    hints = typing.get_type_hints(conversion.convert)
    assert hints.keys() == {*wide, "return"}
    assert all(name in (convert.__doc__ or "") for name in wide if name != "destination")
    shared = [name for name in narrow if name not in ("checkpoint", "destination", "merge")]
    assert "merge: " in (export.__doc__ or "")
    assert all(wide[name] == narrow[name] for name in shared)
    left_out = {"to", "tp", "pp", "pipeline_cuts", "kv_multiplier", "qkv_linear", "fuse_qkv", "coalesce_qkv"}
    assert wide.keys() - narrow.keys() == left_out | {
        *("source", "vocab", "xser", "load_xser", "direction", "n_layers")
    }
