"""Whatever a data file holds, reading it ends with records or with one message."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from fuzz_data import damaged_files

from nxdt_align.data.formats import FORMATS
from nxdt_align.data.reading import Source, load_records
from nxdt_align.data.records import OnBadRecord, Record
from nxdt_align.errors import UserError


def read(path: Path, on_bad_record: OnBadRecord) -> tuple[int, int]:
    """Numbers of records and of messages, over the objectives; any error but UserError is raised."""
    records = messages = 0
    for kind in FORMATS:
        try:
            found = load_records([Source(str(path))], kind, on_bad_record=on_bad_record)
        except UserError as error:
            text = str(error)
            # In the user's log and terminal, whatever the file holds.
            assert text.encode(errors="surrogateescape") and len(text) < 6000, text[:6000]
            messages += 1
        else:
            records += len(found.records)
            for record in found.records:
                assert_text(record)
    return records, messages


def assert_text(record: Record) -> None:
    """It has an id, and a tokenizer would take all of its text."""
    assert len(record.id) == 32
    json.dumps([record.prompt, record.responses], ensure_ascii=False, default=str).encode()


@pytest.mark.parametrize(
    ("seed", "files"),
    [(1, 100), *(pytest.param(seed, 1000, marks=pytest.mark.full) for seed in range(2, 8))],
)
def test_damaged_files(tmp_path: Path, seed: int, files: int) -> None:
    outcomes = [
        read(path, "drop" if i % 2 else "error")
        for i, path in enumerate(itertools.islice(damaged_files(seed, tmp_path), files))
    ]
    assert sum(records > 0 for records, _ in outcomes) > files / 10
    assert sum(messages > 0 for _, messages in outcomes) > files / 2


def test_the_same_seed_damages_alike(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = itertools.islice(damaged_files(3, tmp_path / name), 40)
        contents.append([path.read_bytes() if os.path.isfile(path) else path.name for path in paths])
    assert contents[0] == contents[1]
