"""The reference store: values by record content, and nothing else ever handed out."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nxdt_align.errors import UserError
from nxdt_align.record_ids import Array, IdIndex, as_bytes
from nxdt_align.reference.cache import ReferenceStore, ReferenceStoreError, fingerprint_of

FINGERPRINT = "0f" * 16


def record(number: int) -> str:
    return f"{number:032x}"


def records(*numbers: int) -> Array:
    return as_bytes([record(number) for number in numbers])


def values(count: int, width: int = 2) -> np.ndarray:
    return (-0.1 - np.arange(count * width, dtype=np.float32)).reshape(count, width)


def store_at(root: Path, width: int = 2, **options: bool) -> ReferenceStore:
    return ReferenceStore(root, FINGERPRINT, width, description={"weights": "w"}, **options)


def parts(root: Path) -> list[Path]:
    return sorted((root / FINGERPRINT).glob("part-*"))


def test_values_come_back_in_the_order_asked(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(0, 1, 2, 3, 4), values(5))
    store.flush()
    again = store_at(tmp_path)
    table = again.table(records(3, 0, 3))
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, values(5)[[3, 0, 3]])


def test_width_one(tmp_path: Path) -> None:
    store = store_at(tmp_path, width=1)
    store.add(records(0, 1), values(2, 1))
    store.flush()
    np.testing.assert_array_equal(store_at(tmp_path, width=1).table(records(0, 1)), values(2, 1))
    assert store_at(tmp_path, width=2).missing(records(0, 1)).tolist() == [0, 1]


def test_first_value_of_a_record_wins(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(0, 0), [[-1.0, -2.0], [-3.0, -4.0]])
    store.flush()
    store.add(records(0), [[-5.0, -6.0]])
    store.flush()
    again = store_at(tmp_path)
    np.testing.assert_array_equal(again.values_of(records(0, 1)), [[-1.0, -2.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(again.table(records(0)), [[-1.0, -2.0]])


def test_missing_and_table_of_absent_records(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(1), [[-1.0, -1.0]])
    assert store.missing(records(0, 1, 2)).tolist() == [0, 2]
    with pytest.raises(
        ReferenceStoreError, match=rf"2 of 3 records.*first: record {record(0)} at position 0"
    ):
        store.table(records(0, 1, 2))


def test_nothing_is_written_before_flush_and_each_flush_adds_a_part(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(0, 1), values(2))
    assert parts(tmp_path) == []
    store.flush()
    store.flush()
    store.add(records(7), values(1))
    store.flush()
    assert [p.name[:11] for p in parts(tmp_path)] == ["part-00000-", "part-00001-"]
    about = json.loads((tmp_path / FINGERPRINT / "store.json").read_text())
    assert about["fingerprint_of"] == {"weights": "w"}


def test_two_runs_may_share_a_store(tmp_path: Path) -> None:
    one, two = store_at(tmp_path), store_at(tmp_path)
    one.add(records(1), [[-1.0, -1.0]])
    two.add(records(2), [[-2.0, -2.0]])
    one.flush()
    two.flush()
    np.testing.assert_array_equal(store_at(tmp_path).table(records(1, 2)), [[-1, -1], [-2, -2]])


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
    store.add(records(0, 1), values(4)[:2])
    store.flush()
    store.add(records(2, 3), values(4)[2:])
    store.flush()
    damage(parts(tmp_path)[0])
    again = store_at(tmp_path)
    with pytest.warns(UserWarning, match=r"part-00000.*damaged"):
        assert again.missing(records(0, 1, 2, 3)).tolist() == [0, 1]
    again.add(records(0, 1), values(4)[:2])
    again.flush()
    with pytest.warns(UserWarning, match="damaged"):
        table = store_at(tmp_path).table(records(0, 1, 2, 3))
    np.testing.assert_array_equal(table, values(4))


def test_other_fingerprint_has_other_values(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(0), values(1))
    store.flush()
    assert ReferenceStore(tmp_path, "ab" * 16, 2).missing(records(0)).tolist() == [0]


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
        store.add(records(0, 1, 2), np.array([[-1, -1], [-1, bad], [-1, -1]]))
    assert store.missing(records(0, 1, 2)).tolist() == [0, 1, 2]


def test_wrong_shapes_and_ids_are_refused(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), but have \(2, 1\)"):
        store.add(records(0, 1), values(2, 1))
    for bad in (records(0, 1)[:, :8], records(0, 1).astype(np.int64)):
        with pytest.raises(ValueError, match=r"ids must be \(n, 16\) uint8"):
            store.add(bad, values(2))
    with pytest.raises(ValueError):
        records(2**130)  # 33 hex digits
    with pytest.raises(ValueError, match="letters and digits"):
        ReferenceStore(tmp_path, "../x", 2)


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="read-only"):
        store_at(tmp_path, read_only=True).add(records(0), values(1))
    quiet = store_at(tmp_path, read_only=True, ignore_adds=True)
    quiet.add(records(0), np.zeros((1, 2)))
    quiet.prepare()
    quiet.flush()
    assert list(tmp_path.iterdir()) == [] and quiet.pending == 0


def test_full_disk_is_a_user_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(tmp_path)
    store.add(records(0), values(1))
    store.flush()
    store.add(records(9), values(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=rf"cannot write.*{tmp_path}.*free some space"):
            store.flush()
    assert len(parts(tmp_path)) == 1
    store.flush()
    assert store_at(tmp_path).missing(records(0, 9)).tolist() == []


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    store = ReferenceStore(tmp_path / "root", FINGERPRINT, 2)
    with pytest.raises(UserError, match="a file, not a folder"):
        store.prepare()


def test_a_store_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Written by the version before tables were: its values count, and it is added to."""
    shutil.copytree(Path(__file__).with_name("old_store"), tmp_path, dirs_exist_ok=True)
    made_from = {"weights": "w1", "model": "m", "tokenization": "t", "precision": "p"}
    (folder,) = tmp_path.iterdir()
    assert folder.name == fingerprint_of(made_from)
    store = ReferenceStore(tmp_path, folder.name, 2, description=made_from)
    assert store.missing(records(4, 5, 0)).tolist() == [1]
    wanted = [[-9.0, -8.0], [-1.5, -2.25], [-100.125, -7.0]]
    np.testing.assert_array_equal(store.table(records(4, 0, 2)), wanted)
    store.add(records(5, 0), [[-6.0, -7.0], [-1.0, -1.0]])
    store.flush()
    assert [p.name[:11] for p in sorted(folder.glob("part-*"))][-1] == "part-00002-"
    np.testing.assert_array_equal(store.table(records(5, 0)), [[-6.0, -7.0], [-1.5, -2.25]])


def test_a_store_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add(records(0), values(1))
    store.flush()
    store.table(records(0))  # what is ready is not used either
    about = tmp_path / FINGERPRINT / "store.json"
    about.write_text(about.read_text().replace("store 1", "store 9"))
    again = store_at(tmp_path)
    message = r"is 'nxdt-align reference store 9', but this version reads .*store 1.*another data.cache_dir"
    for use in (lambda: again.missing(records(0)), lambda: again.table(records(0)), again.prepare):
        with pytest.raises(UserError, match=message):
            use()
    again.add(records(1), values(1))
    with pytest.raises(UserError, match=message):
        again.flush()
    about.write_text("{")  # for humans alone, so that it may be damaged
    assert again.missing(records(0)).tolist() == []


def tables(root: Path) -> list[Path]:
    return sorted((root / FINGERPRINT / "tables").iterdir())


def test_a_table_is_mapped_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reading the parts; another order, or another data set, is another table."""
    store = store_at(tmp_path)
    store.add(records(0, 1, 2), values(3))
    store.flush()
    made = store.table(records(2, 0, 2, 2))
    assert isinstance(made, np.memmap) and not made.flags.writeable
    store.table(records(0, 2))
    assert len(tables(tmp_path)) == 2
    with monkeypatch.context() as patch:
        patch.setattr("nxdt_align.reference.cache.read_part", None)
        again = store_at(tmp_path)
        assert again.missing(records(2, 0, 2, 2)).tolist() == []
        np.testing.assert_array_equal(again.table(records(2, 0, 2, 2)), values(3)[[2, 0, 2, 2]])
    assert len(tables(tmp_path)) == 2


@pytest.mark.parametrize("damage", [damage_truncated, damage_header, damage_empty, damage_bit])
def test_a_damaged_table_is_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = store_at(tmp_path)
    store.add(records(0, 1, 2), values(3))
    store.flush()
    store.table(records(2, 1))
    (table,) = tables(tmp_path)
    whole = table.read_bytes()
    damage(table)
    again = store_at(tmp_path)
    np.testing.assert_array_equal(again.table(records(2, 1)), values(3)[[2, 1]])
    assert table.read_bytes() == whole


def test_no_space_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserved before it is mapped: the system would end a process that writes to a page without space."""
    store = store_at(tmp_path)
    store.add(records(0, 1), values(2))
    store.flush()

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match=rf"cannot write.*{tmp_path}.*free some space"):
            store.table(records(0, 1))
    assert tables(tmp_path) == []
    np.testing.assert_array_equal(store.table(records(0, 1)), values(2))


def test_a_store_without_rights_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, whom no rights stop, the system's answer is put in its place."""
    store = store_at(tmp_path)
    store.add(records(0), values(1))
    store.flush()
    store.add(records(1), values(1))
    replace = os.replace

    def refuse(source: str, target: str) -> None:
        if FINGERPRINT in str(target):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match=rf"cannot write.*{FINGERPRINT}: permission denied: make the"):
            store.flush()
    assert len(parts(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.nxdt-tmp"))


def test_ids_that_share_half_of_their_hash() -> None:
    """Found by all of it: 1,000 ids of 10 first halves, and others that differ in the second alone."""
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 10, (1000, 1), np.uint8), rng.integers(0, 256, (1000, 8), np.uint8)
    ids = np.concatenate([np.tile(first, 8), second], axis=1)
    index = IdIndex(ids[:600])
    np.testing.assert_array_equal(index.find(ids[::-1])[400:], np.arange(600)[::-1])
    assert (index.find(ids[600:]) == -1).all()
    assert IdIndex(ids[:0]).find(ids[:2]).tolist() == [-1, -1]
