"""Every kind of file gives the same records; what cannot be read says why."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nxdt_align.data.records import DataError
from nxdt_align.data.sources import read_raw

ROWS = [{"prompt": f"p{i}", "chosen": "é ✓", "rejected": "\u2028no line end"} for i in range(5)]


def _lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")


def _array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), "utf-8")


def _compact_array(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())


def _windows_lines(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in ROWS))


def _gzipped(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def write_gzipped(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_gzipped


def _arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


def _saved_folder(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(path), num_shards=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", _lines),
        ("lines_by_mistake.json", _lines),
        ("array.json", _array),
        ("array_by_mistake.jsonl", _compact_array),
        ("WINDOWS.JSONL", _windows_lines),
        ("a.jsonl.gz", _gzipped(_lines)),
        ("a.json.gz", _gzipped(_array)),
        ("stream.arrow", _arrow_stream),
        ("file.arrow", _arrow_file),
        ("a.parquet", _parquet),
        ("saved", _saved_folder),
    ],
)
def test_reads(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    records = list(read_raw(str(tmp_path / name)))
    assert [record.value for record in records] == ROWS
    assert all(record.fault is None for record in records)


def test_places_are_lines(tmp_path: Path) -> None:
    """A blank line counts; an array's element is placed where it begins."""
    lines, array = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    array.write_text('[\n {"a": 1},\n\n {"a":\n 2}\n]')
    assert [record.place for record in read_raw(str(lines))] == [f"{lines}:1", f"{lines}:3"]
    assert [record.place for record in read_raw(str(array))] == [f"{array}:2", f"{array}:4"]


def test_records_by_prompt(tmp_path: Path) -> None:
    """The DPO reference implementation keeps one object, prompt -> responses."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"p": {"responses": ["a", "b"], "pairs": [[0, 1]]}, "q": {"responses": []}}))
    assert [record.value for record in read_raw(str(path))] == [
        {"prompt": "p", "responses": ["a", "b"], "pairs": [[0, 1]]},
        {"prompt": "q", "responses": []},
    ]


def test_bad_lines_are_faults_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "caf\xe9"}\n{"a": 2}\n')
    records = list(read_raw(str(path)))
    assert [record.value for record in records] == [{"a": 1}, None, None, {"a": 2}]
    assert [record.fault and record.fault.reason for record in records] == [
        None,
        "bad JSON",
        "not UTF-8",
        None,
    ]
    assert records[2].place == f"{path}:3" and r"\xe9" in str(records[2].fault)


def _broken_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])


def _not_gzip(path: Path) -> None:
    path.write_bytes(b'{"a": 1}\n')


def _text(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def _truncated_arrow(path: Path) -> None:
    _arrow_file(path)
    path.write_bytes(path.read_bytes()[:-40])


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside.jsonl").write_text("{}")


def _incomplete_saved_folder(path: Path) -> None:
    _saved_folder(path)
    next(path.glob("data-00001*")).unlink()


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("empty.jsonl", _text(""), "is empty"),
        ("a.csv", _text("a,b"), "unknown file type; a data file ends in one of .jsonl"),
        ("cut.jsonl.gz", _broken_gzip, "broken gzip data"),
        ("no.jsonl.gz", _not_gzip, "broken gzip data"),
        ("a.json", _text('[\n{"a": 1},\n{"a" 2}\n]'), ":3: bad JSON inside the array"),
        ("b.json", _text('[{"a": 1}\n{"a": 2}]'), ":2: bad JSON: expected ',' or"),
        ("c.json", _text('[{"a": 1}'), ":1: bad JSON: expected ',' or"),
        ("d.json", _text('[{"a": 1}]\n[{"a": 2}]'), "follows the array's end"),
        ("a.arrow", _text("not arrow at all"), "is not a whole Arrow file"),
        ("cut.arrow", _truncated_arrow, "is not a whole Arrow file"),
        ("a.parquet", _text("PAR1 not parquet"), "is not a whole Parquet file"),
        ("folder", _folder, "is a folder; name one data file.*inside.jsonl"),
        ("saved", _incomplete_saved_folder, "is incomplete: data-00001"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        list(read_raw(str(tmp_path / name)))
    assert name in str(caught.value)


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "data_dpo.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"does not exist; its folder holds data_dpo\.jsonl"):
        list(read_raw(str(tmp_path / "data-dpo.jsonl")))
    with pytest.raises(DataError, match="does not exist"):
        list(read_raw("no/such.jsonl"))


def test_unreachable_data_set() -> None:
    with pytest.raises(DataError, match=r"org/none:train_prefs is neither a file here nor a data set"):
        list(read_raw("org/none:train_prefs"))


def test_data_set_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """``org/name:split`` asks `datasets` for that split; ``train`` unless named."""
    import datasets

    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [record.value for record in read_raw("org/name")] == ROWS
    assert next(read_raw("org/name:train_prefs")).place == "org/name:train_prefs:record 1"
    assert asked == [("org/name", "train"), ("org/name", "train_prefs")]
