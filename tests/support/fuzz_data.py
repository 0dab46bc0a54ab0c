"""Damaged data files without end: what disks, other programs and mistakes make of preference data."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
Write = Callable[[Path, Rows], None]


def damaged_files(seed: int, folder: Path) -> Iterator[Path]:
    """Write one data file after another into ``folder`` and yield its path; the iterator does not end.

    Each holds a few records of some format (pairs, chat, labels, rankings, ...) in some container (JSON
    lines, arrays and objects, plain or gzipped; Arrow, Parquet, folders of save_to_disk), of which a value,
    the bytes or the surroundings are damaged, and sometimes nothing is. A few are no files at all: pipes,
    links that lead in a circle, names that are not text. The same seed writes the same files, under the same
    names; they take at most a few MB each, bombs up to 64 MB once unpacked.

    A reader of ``folder`` must end with records or with one message for each, in bounded time and memory,
    never with a traceback, a hang or a crash.
    """
    draw = random.Random(seed)
    for number in range(2**62):
        place = folder / f"{number:06d}"
        if draw.random() < 0.15:
            yield draw.choice(_SPECIALS)(draw, place)
            continue
        rows = _rows(draw)
        if draw.random() < 0.6:
            _spoil_values(draw, rows)
        ending, write = draw.choice(_CONTAINERS)
        try:
            write(place, rows)
        except Exception:
            # What was drawn cannot be written in this container: Arrow has no integers of 5,000 digits.
            _remove(place)
            ending, write = ".jsonl", _lines
            write(place, rows)
        if draw.random() < 0.7:
            _spoil_bytes(draw, place)
        named = place.with_name(place.name + _other_ending(draw, ending))
        place.rename(named)
        yield named


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


# Records

_USER, _REPLY = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
_NO = {"role": "assistant", "content": "no"}
_SAMPLES: tuple[dict[str, Any], ...] = (
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"prompt": [_USER], "chosen": [_USER, _REPLY], "rejected": [_USER, _NO]},
    {"prompt": [_USER], "chosen": [{**_REPLY, "tool_calls": [{"function": {"name": "f"}}]}], "rejected": "b"},
    {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
    {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
    {"src": "p", "tgt_chosen": "a", "tgt_rejected": "b"},
    {"prompt": "p", "responses": ["a", "b", "c"], "pairs": [[0, 1], [2, 1]], "sft_target": "c"},
    {"conversations": [{"from": "human", "value": "hi"}], "chosen": _REPLY, "rejected": _NO},
    {
        "instruction": "i",
        "input": "m",
        "system": "s",
        "history": [["q", "r"]],
        "chosen": "a",
        "rejected": "b",
    },
    {"instruction": "i", "input": "", "output": "a", "kto_tag": True},
    {"input": {"messages": [_USER]}, "preferred_output": [_REPLY], "non_preferred_output": [_NO]},
    {"chosen_conversations": [_USER, _REPLY], "rejected_conversations": [_USER, _NO]},
    {"messages": [_USER, _REPLY], "rejected_response": "no", "label": False},
    {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 2},
    {"question": "q", "answers": [{"text": "a", "pm_score": 1}, {"text": "b", "pm_score": 3}]},
    {"prompt": "p", "answers": [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2.0}]},
    {"instruction": "i", "completions": [{"response": "a", "overall_score": 2.5}]},
    {"prompt": "p", "completion": "c", "label": True},
    {"prompt": "p", "response": "r"},
)


def _rows(draw: random.Random) -> Rows:
    sample = json.dumps(draw.choice(_SAMPLES))
    return [json.loads(sample) | {"number": i} for i in range(draw.choice((1, 3, 3, 40)))]


def _nested(depth: int) -> Any:
    value: Any = "deep"
    for i in range(depth):
        value = [value] if i % 2 else {"content": value}
    return value


_PLAIN: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, "", " ", [], {}, [[]], [None]),
    *(float("nan"), float("inf"), -(2**63), 2**64, 10**4000),
)
_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda draw: copy.deepcopy(draw.choice(_PLAIN)),
    lambda draw: copy.deepcopy(draw.choice(_PLAIN)),
    lambda draw: "\ud800" + "x" * draw.randrange(3),
    lambda draw: "x\x00\x1b[2J\r\n\u2028",
    lambda draw: "y" * draw.choice((1000, 200_000)),
    lambda draw: _nested(draw.choice((3, 60, 150, 400))),
    lambda draw: {
        "role": draw.choice(("user", "tool", "", "\ud800")),
        "content": draw.choice((None, "c", 3)),
    },
    lambda draw: [["q", "r"], ["q"]],
    lambda draw: [{"from": "gpt", "value": "v"}, {"role": 3}],
    lambda draw: [0, 2**70],
)
_KEYS = (
    "",
    "\ud800",
    "a\x00b",
    "k" * 5000,
    "prompt ",
    "Chosen",
    "role",
    "content",
    "label",
    "é\u2028",
    "system",
)


def _spoil_values(draw: random.Random, rows: Rows) -> None:
    for _ in range(draw.choice((1, 1, 2, 5))):
        holder: Any = draw.choice(rows)
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(holder[key], dict | list) and draw.random() < 0.7:
                holder = holder[key]
                continue
            action = draw.randrange(4)
            if action == 0 and isinstance(holder, dict):
                holder[draw.choice(_KEYS)] = holder.pop(key)
            elif action == 1:
                del holder[key]
            else:
                holder[key] = draw.choice(_VALUES)(draw)
            break


# Containers


def _lines(place: Path, rows: Rows) -> None:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _array(place: Path, rows: Rows) -> None:
    place.write_text(json.dumps(rows, indent=len(rows) % 2 or None))


def _by_prompt(place: Path, rows: Rows) -> None:
    place.write_text(json.dumps({f"p{i}": row for i, row in enumerate(rows)}))


def _gzipped(write: Write) -> Write:
    def write_gzipped(place: Path, rows: Rows) -> None:
        write(place, rows)
        place.write_bytes(gzip.compress(place.read_bytes(), mtime=0))

    return write_gzipped


def _arrow(kind: str, compression: str | None = None) -> Write:
    def write(place: Path, rows: Rows) -> None:
        import pyarrow as pa

        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with open(place, "wb") as file, new(file, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=2)

    return write


def _parquet(place: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), place, row_group_size=2)


def _saved(place: Path, rows: Rows) -> None:
    """As datasets' save_to_disk, without the import of it."""
    place.mkdir()
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        _arrow("stream")(place / name, rows[i::2] or rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (place / "state.json").write_text(json.dumps(state, indent=2))
    (place / "dataset_info.json").write_text("{}")


_CONTAINERS: tuple[tuple[str, Write], ...] = (
    *((".jsonl", _lines), (".jsonl", _lines), (".json", _lines), (".jsonl", _array), (".json", _array)),
    *((".json", _by_prompt), (".jsonl.gz", _gzipped(_lines)), (".json.gz", _gzipped(_array))),
    *((".arrow", _arrow("stream")), (".arrow", _arrow("file")), (".arrow", _arrow("file", "zstd"))),
    *((".parquet", _parquet), ("", _saved)),
)


def _other_ending(draw: random.Random, ending: str) -> str:
    if draw.random() < 0.9:
        return ending
    return draw.choice((".jsonl", ".json", ".JSON", ".json.gz", ".arrow", ".parquet", ".csv", ""))


# Bytes


def _spoil_bytes(draw: random.Random, place: Path) -> None:
    if place.is_dir():
        place = draw.choice(sorted(place.iterdir()))
        if draw.random() < 0.3:
            place.unlink()
            return
    data = bytearray(place.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 8))):
        data = draw.choice(_DAMAGE)(draw, data)
    place.write_bytes(data)


def _at(draw: random.Random, data: bytearray) -> int:
    """Headers and footers are hit more often than chance would."""
    place = draw.choice((draw.randrange(64), draw.randrange(len(data) + 1), len(data) - draw.randrange(64)))
    return max(0, min(place, len(data)))


def _flip(draw: random.Random, data: bytearray) -> bytearray:
    at = _at(draw, data)
    if at < len(data):
        data[at] ^= 1 << draw.randrange(8)
    return data


def _overwrite(draw: random.Random, data: bytearray) -> bytearray:
    at, count = _at(draw, data), draw.choice((1, 4, 8, 300))
    data[at : at + count] = draw.choice((bytes(count), b"\xff" * count, draw.randbytes(count)))
    return data


def _cut(draw: random.Random, data: bytearray) -> bytearray:
    at = _at(draw, data)
    return draw.choice((data[:at], data[at:], data[:at] + data[at + draw.randrange(20) :]))


def _insert(draw: random.Random, data: bytearray) -> bytearray:
    at = _at(draw, data)
    texts = (
        b"\x00",
        b"\r",
        b"\n",
        b"\xef\xbb\xbf",
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
        b"NaN",
        b"]\n",
    )
    return data[:at] + draw.choice((*texts, b'"\\ud800"', b"1e999999", draw.randbytes(9))) + data[at:]


def _encode(draw: random.Random, data: bytearray) -> bytearray:
    encodings = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-7", "cp037")
    return bytearray(bytes(data).decode("latin-1").encode(draw.choice(encodings), "replace"))


def _line_ends(draw: random.Random, data: bytearray) -> bytearray:
    return data.replace(b"\n", draw.choice((b"\r\n", b"\r", b"", b"\n\n\n", b"\x00\n")))


_DAMAGE = (_flip, _flip, _overwrite, _overwrite, _cut, _cut, _insert, _insert, _encode, _line_ends)


# No data files at all, and bombs


def _written(name: str, data: Callable[[random.Random], bytes]) -> Callable[[random.Random, Path], Path]:
    def write(draw: random.Random, place: Path) -> Path:
        place = place.with_name(place.name + name)
        place.write_bytes(data(draw))
        return place

    return write


_RECORD = json.dumps({"prompt": "p" * 2000, "chosen": "a", "rejected": "b"}).encode() + b"\n"


def _bomb(draw: random.Random) -> bytes:
    return _packed(draw.choice((b"\n", b" ", b"[", b"0", b"\x00", _RECORD)))


@cache
def _packed(unit: bytes) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        for _ in range(40):
            file.write(unit * (2**20 // len(unit)))
    return packed.getvalue()


def _folder(draw: random.Random, place: Path) -> Path:
    place = place.with_name(place.name + draw.choice(("", ".jsonl", ".arrow")))
    place.mkdir()
    states: tuple[bytes, ...] = (
        b"",
        b"{}",
        b"[" * 3000,
        b'{"_data_files": 3}',
        b'{"_data_files": [{"filename": 3}]}',
        b"\xff",
    )
    states += (
        b'{"_data_files": [{"filename": "../x.arrow"}]}',
        b'{"_data_files": [{"filename": "\\ud800"}]}',
    )
    if draw.random() < 0.8:
        (place / draw.choice(("state.json", "dataset_dict.json"))).write_bytes(draw.choice(states))
    return place


def _pipe(draw: random.Random, place: Path) -> Path:
    place = place.with_name(place.name + ".jsonl")
    os.mkfifo(place)
    return place


def _link(draw: random.Random, place: Path) -> Path:
    place = place.with_name(place.name + ".jsonl")
    place.symlink_to(draw.choice((place.name, "nowhere.jsonl", "/dev/zero", ".")))
    return place


def _unreadable(draw: random.Random, place: Path) -> Path:
    place = place.with_name(place.name + draw.choice((".jsonl", ".arrow", ".parquet")))
    place.write_bytes(b"{}")
    place.chmod(0)
    return place


def _odd_name(draw: random.Random, place: Path) -> Path:
    name = os.fsdecode(place.name.encode() + draw.choice((b"caf\xe9", b"a\nb", b" ", b"\x1b[2J", b"%s{x}")))
    place = place.with_name(name + ".jsonl")
    place.write_bytes(draw.choice((b"{", b'{"prompt": "p", "chosen": "a", "rejected": "b"}')))
    return place


def _missing(draw: random.Random, place: Path) -> Path:
    return place.with_name(draw.choice(("none.jsonl", "n" * 300, "nul\x00l.jsonl", "sur\ud800.jsonl")))


_SPECIALS: tuple[Callable[[random.Random, Path], Path], ...] = (
    *(_folder, _pipe, _link, _unreadable, _odd_name, _missing),
    _written(".jsonl.gz", _bomb),
    _written(".json.gz", _bomb),
    _written(
        ".jsonl", lambda draw: draw.choice((b"", b"\n \n", b"\xef\xbb\xbf", bytes(5000), b"[", b"[]", b"{}"))
    ),
    _written(".json", lambda draw: draw.choice((b"[", b'{"a":')) * draw.choice((900, 3000, 100_000))),
    _written(".jsonl", lambda draw: b'{"prompt": ' + b"9" * draw.choice((4000, 5000, 500_000)) + b"}\n"),
    _written(".jsonl", lambda draw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
    _written(".json", lambda draw: b"<!DOCTYPE html><html>"),
)
