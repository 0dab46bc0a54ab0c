"""The reference store: values by record content, and nothing else ever handed out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nxdt_align.errors import UserError
from nxdt_align.reference.cache import ReferenceStore, ReferenceStoreError, fingerprint_of

FINGERPRINT = "0f" * 16


def record(number: int) -> str:
    return f"{number:032x}"


def records(count: int) -> list[str]:
    return [record(i) for i in range(count)]


def values(count: int, width: int = 2) -> np.ndarray:
    return (-0.1 - np.arange(count * width, dtype=np.float32)).reshape(count, width)


def store_at(root: Path, width: int = 2, **options: bool) -> ReferenceStore:
    return ReferenceStore(root, FINGERPRINT, width, description={"weights": "w"}, **options)


def parts(root: Path) -> list[Path]:
    return sorted((root / FINGERPRINT).glob("part-*"))


def test_values_come_back_in_the_order_asked(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(5), values(5))
    store.flush()
    again = store_at(tmp_path)
    assert len(again) == 5
    table = again.table([record(3), record(0), record(3)])
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, values(5)[[3, 0, 3]])


def test_width_one(tmp_path: Path) -> None:
    store = store_at(tmp_path, width=1)
    store.add(records(2), values(2, 1))
    store.flush()
    np.testing.assert_array_equal(store_at(tmp_path, width=1).table(records(2)), values(2, 1))
    assert store_at(tmp_path, width=2).missing(records(2)) == [0, 1]


def test_first_value_of_a_record_wins(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add([record(0), record(0)], [[-1.0, -2.0], [-3.0, -4.0]])
    store.flush()
    store.add([record(0)], [[-5.0, -6.0]])
    assert store.pending == 0
    store.flush()
    assert len(parts(tmp_path)) == 1
    np.testing.assert_array_equal(store_at(tmp_path).table([record(0)]), [[-1.0, -2.0]])


def test_missing_and_table_of_absent_records(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add([record(1)], [[-1.0, -1.0]])
    assert store.missing(records(3)) == [0, 2]
    with pytest.raises(
        ReferenceStoreError, match=rf"2 of 3 records.*first: record {record(0)} at position 0"
    ):
        store.table(records(3))


def test_nothing_is_written_before_flush_and_each_flush_adds_a_part(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(2), values(2))
    assert parts(tmp_path) == []
    store.flush()
    store.flush()
    store.add([record(7)], values(1))
    store.flush()
    assert [p.name[:11] for p in parts(tmp_path)] == ["part-00000-", "part-00001-"]
    about = json.loads((tmp_path / FINGERPRINT / "store.json").read_text())
    assert about["fingerprint_of"] == {"weights": "w"}


def test_two_runs_may_share_a_store(tmp_path: Path) -> None:
    one, two = store_at(tmp_path), store_at(tmp_path)
    one.add([record(1)], [[-1.0, -1.0]])
    two.add([record(2)], [[-2.0, -2.0]])
    one.flush()
    two.flush()
    np.testing.assert_array_equal(store_at(tmp_path).table([record(1), record(2)]), [[-1, -1], [-2, -2]])


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def damage_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_truncated, damage_header, damage_empty, damage_bit])
def test_damaged_part_is_not_trusted(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = store_at(tmp_path)
    store.add(records(2), values(4)[:2])
    store.flush()
    store.add([record(2), record(3)], values(4)[2:])
    store.flush()
    damage(parts(tmp_path)[0])
    with pytest.warns(UserWarning, match=r"part-00000.*damaged"):
        again = store_at(tmp_path)
        again.load()
    assert again.missing(records(4)) == [0, 1]
    again.add(records(2), values(4)[:2])
    again.flush()
    with pytest.warns(UserWarning, match="damaged"):
        last = store_at(tmp_path)
        last.load()
    np.testing.assert_array_equal(last.table(records(4)), values(4))


def test_other_fingerprint_has_other_values(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(1), values(1))
    store.flush()
    assert ReferenceStore(tmp_path, "ab" * 16, 2).missing(records(1)) == [0]


def test_fingerprint_changes_with_every_part_and_not_with_their_order() -> None:
    parts = {"weights": "1", "tokenizer": "2", "dtype": "bf16"}
    base = fingerprint_of(parts)
    assert base == fingerprint_of(dict(reversed(parts.items()))) and len(base) == 32
    assert len({base, *(fingerprint_of({**parts, name: "x"}) for name in parts)}) == 4
    assert fingerprint_of({"a": "b,c"}) != fingerprint_of({"a": "b", "c": ""})
    with pytest.raises(TypeError, match="'dtype' must be text"):
        fingerprint_of({**parts, "dtype": 16})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="at least one part"):
        fingerprint_of({})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    store = store_at(tmp_path)
    with pytest.raises(ReferenceStoreError, match=f"not finite.*record {record(1)}"):
        store.add(records(3), np.array([[-1, -1], [-1, bad], [-1, -1]]))
    assert store.missing(records(3)) == [0, 1, 2]


def test_wrong_shapes_and_ids_are_refused(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), but have \(2, 1\)"):
        store.add(records(2), values(2, 1))
    for bad in ("xyz", "ab", "ab" * 20):
        with pytest.raises(ValueError, match="32 hex digits"):
            store.missing([bad])
    with pytest.raises(ValueError, match="letters and digits"):
        ReferenceStore(tmp_path, "../x", 2)


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="read-only"):
        store_at(tmp_path, read_only=True).add(records(1), values(1))
    quiet = store_at(tmp_path, read_only=True, ignore_adds=True)
    quiet.add(records(1), np.zeros((1, 2)))
    quiet.prepare()
    quiet.flush()
    assert list(tmp_path.iterdir()) == [] and len(quiet) == 0


def test_full_disk_is_a_user_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(tmp_path)
    store.add(records(1), values(1))
    store.flush()
    store.add([record(9)], values(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=rf"cannot write.*{tmp_path}.*free some space"):
            store.flush()
    assert len(parts(tmp_path)) == 1
    store.flush()
    assert store_at(tmp_path).missing([record(0), record(9)]) == []


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    store = ReferenceStore(tmp_path / "root", FINGERPRINT, 2)
    with pytest.raises(UserError, match="a file, not a folder"):
        store.prepare()
