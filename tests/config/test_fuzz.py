"""Whatever a configuration holds, it is read or refused in one message, soon."""

from __future__ import annotations

import itertools
import time
import warnings
from pathlib import Path

import pytest
import yaml
from fuzz_config import broken_configs
from training_fixture import Project

from nxdt_align.config.check import load_checked
from nxdt_align.config.load import to_yaml
from nxdt_align.errors import UserError

LONGEST_MESSAGE = 20_000
SECONDS = 60.0
"""Far above what any case takes."""


def try_them(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """How many were read, and how many were refused."""
    good = yaml.safe_dump(Project._settings(folder))
    path = folder / "fuzzed.yaml"
    read = refused = 0
    for case in itertools.islice(broken_configs(seed, good), count):
        path.write_bytes(case.text.encode("utf-8", "surrogatepass"))
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Hydra's, on a list of defaults
                to_yaml(load_checked(str(path), case.overrides).config)
            read += 1
        except UserError as error:
            refused += 1
            assert len(str(error)) < LONGEST_MESSAGE, case
        except Exception as error:
            raise AssertionError(str(case)[:5000]) from error
        assert time.monotonic() - start < SECONDS, case
    return read, refused


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the good configuration names, as far as its rules look."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    for name in ("train.jsonl", "val.jsonl", "tokenizer/tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "hidden_size": 32, "vocab_size": 128}')
    return tmp_path


def test_some_broken_configurations(files: Path) -> None:
    read, refused = try_them(files, seed=1, count=25)
    assert read and refused


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 20))
def test_many_broken_configurations(files: Path, seed: int) -> None:
    read, refused = try_them(files, seed, count=400)
    assert read and refused
