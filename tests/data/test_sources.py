"""Every kind of file gives the same records; what cannot be read says why."""

from __future__ import annotations

import gzip
import json
import os
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


def _packed_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
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
        ("ENDING.JSON", _lines),
        ("array.json", _array),
        ("array_by_mistake.jsonl", _compact_array),
        ("WINDOWS.JSONL", _windows_lines),
        ("a.jsonl.gz", _gzipped(_lines)),
        ("a.json.gz", _gzipped(_array)),
        ("stream.arrow", _arrow_stream),
        ("file.arrow", _arrow_file),
        ("packed.arrow", _packed_arrow),
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


def _bytes(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def _bomb(unit: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(gzip.compress(unit * (20 * 2**20 // len(unit))))


def _claims_rows(path: Path) -> None:
    schema = pa.schema([("prompt", pa.null())])
    batch = pa.RecordBatch.from_arrays([pa.nulls(10_000_001)], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)


def _parquet_bomb(path: Path) -> None:
    table = pa.table({"prompt": [bytes(2**20)] * 70})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def _arrow_bomb(kind: str, compression: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table = pa.table({"prompt": [bytes(2**20)] * 70})
        options = pa.ipc.IpcWriteOptions(compression=compression)
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
            writer.write_table(table)

    return write


def _wrong_offsets(path: Path) -> None:
    """The text of the second row would begin at byte 0x7fffff00 of the column."""
    _arrow_file(path)
    data = path.read_bytes()
    offsets = (0).to_bytes(4, "little") + (2).to_bytes(4, "little") + (4).to_bytes(4, "little")
    assert offsets in data
    path.write_bytes(data.replace(offsets, offsets[:4] + (0x7FFFFF00).to_bytes(4, "little") + offsets[8:], 1))


def _state(text: str | None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        _saved_folder(path)
        (path / "state.json").unlink() if text is None else (path / "state.json").write_text(text)

    return write


def _splits(path: Path) -> None:
    path.mkdir()
    (path / "dataset_dict.json").write_text("{}")
    _saved_folder(path / "train")


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


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
        ("none.arrow", _wrong_offsets, "is not a whole Arrow file"),
        ("bomb.parquet", _parquet_bomb, "unpacks to 73,4.* bytes, 1,000 times its size or more"),
        ("bomb.arrow", _arrow_bomb("file", "zstd"), "unpacks to 73,4.* bytes, 1,000 times its size or more"),
        ("bomb_stream.arrow", _arrow_bomb("stream", "zstd"), "unpacks to 73,4.* bytes"),
        ("rows.arrow", _claims_rows, "claims more than 10,000,000 rows"),
        ("no_state", _state(None), "save_to_disk, but its state.json is missing"),
        *(
            ("state", _state(text), r"state.json does not list data files .* save the data set again")
            for text in (
                "",
                "[",
                "[" * 3000,
                "[]",
                '{"_data_files": 3}',
                '{"_data_files": [{"filename": 3}]}',
            )
        ),
        ("outside", _state('{"_data_files": [{"filename": "../x.arrow"}]}'), "does not list data files"),
        ("surrogate", _state(r'{"_data_files": [{"filename": "\ud800"}]}'), "does not list data files"),
        ("splits", _splits, "name the folder of one: train"),
        ("bomb.jsonl.gz", _bomb(b"\n"), "unpacks to more than 200 times its size"),
        ("bomb.json.gz", _bomb(b"["), "unpacks to more than 200 times its size"),
        ("one_line.jsonl.gz", _bomb(b"x"), "unpacks to more than 200 times its size"),
        ("utf16.jsonl", _bytes('{"a": 1}'.encode("utf-16")), "holds UTF-16 text; save it as UTF-8"),
        ("utf16.json", _bytes('{"a": 1}'.encode("utf-16-le")), "holds UTF-16 text; save it as UTF-8"),
        ("packed.jsonl", _bytes(gzip.compress(b'{"a": 1}')), "holds gzip data; name it with .gz"),
        ("lfs.jsonl", _text("version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
        ("page.json", _text("\n<!DOCTYPE html>"), "holds a web page"),
        ("deep.json", _text("[" * 3000), "bad JSON inside the array: nested more than 100 deep"),
        ("number.json", _text("[" + "9" * 5000 + "]"), "a number has more than 4,300 digits"),
        ("circle.jsonl", _link("circle.jsonl"), "cannot be read: Too many levels of symbolic links"),
        ("dangling.jsonl", _link("gone.jsonl"), "is a link to gone.jsonl, which does not exist"),
        ("device.jsonl", _link("/dev/zero"), "is a pipe, socket or device"),
        ("pipe.jsonl", os.mkfifo, "is a pipe, socket or device"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        list(read_raw(str(tmp_path / name)))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ' + b"9" * 5000 + b"}", "bad JSON: a number has more than 4,300 digits, in"),
        (b"[" * 3000, "bad JSON: nested more than 100 deep, in"),
        (b'{"a": ' + b"[" * 120 + b"]" * 120 + b"}", "bad JSON: nested more than 100 deep, in"),
        (bytes(300), "bad JSON: Expecting value"),
        (b'"' + b"x" * (33 * 2**20) + b'"', "too long: the line has more than 33,554,432 bytes"),
    ],
)
def test_a_line_beyond_bounds_costs_itself_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, bad, last = read_raw(str(path))
    assert (first.value, last.value, last.place) == ({"a": 1}, {"a": 2}, f"{path}:3")
    assert str(bad.fault).startswith(reason) and len(str(bad.fault)) < 200
    array = tmp_path / "b.json"
    array.write_bytes(b"[1, " + b"[" * 120 + b"]" * 120 + b", 2]")
    assert [record.fault is None for record in read_raw(str(array))] == [True, False, True]


def test_a_row_beyond_bounds_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"a": str(i)} for i in range(40)]
    rows[7] = {"a": "x" * 33 * 2**20}
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = list(read_raw(str(path)))
    assert str(found[7].fault) == "too long: it has more than 33,554,432 bytes" and found[7].value is None
    assert [r.value for r in found if r.fault is None] == rows[:7] + rows[8:]


@pytest.mark.parametrize("ending", [".jsonl", ".arrow", ".parquet"])
def test_no_permission(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"{}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match=f"a{ending} cannot be read: Permission denied"):
        list(read_raw(str(path)))


@pytest.mark.parametrize(
    "path", ["nul\x00l.jsonl", "sur\ud800.jsonl", "n" * 300 + ".jsonl", "~no-such-user/a.jsonl"]
)
def test_what_can_be_no_path(path: str) -> None:
    with pytest.raises(DataError, match=r"cannot be (the path of a file|read)"):
        list(read_raw(path))


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
