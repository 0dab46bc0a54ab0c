"""Stores of several machines, made into one; and what a store's folder holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import record_ids

from nxdt_align.cli import main
from nxdt_align.errors import UserError
from nxdt_align.reference import stores
from nxdt_align.reference.cache import ReferenceStore, fingerprint_of
from nxdt_align.reference.stores import examine, find_stores, merge, words

MADE_FROM = {"weights": "w1", "model": "m", "tokenization": "t", "precision": "p"}


def store_with(root: Path, records: list[int], offset: float = 0.0, **other: str) -> ReferenceStore:
    made_from = MADE_FROM | other
    store = ReferenceStore(root, fingerprint_of(made_from), 2, description=made_from)
    store.add(record_ids(20)[records], [[-record - 1 + offset, -2.0] for record in records])
    store.flush()
    return store


def test_shares_become_one_store(tmp_path: Path) -> None:
    """A destination that is not there, then one that is; a source by its own folder or by its root's."""
    one = store_with(tmp_path / "a", [0, 1, 2])
    store_with(tmp_path / "b" / "reference", [2, 3])
    done = merge([one.folder, tmp_path / "b"], tmp_path / "all")
    assert (done.records, done.added, done.known, done.sources) == (4, 4, 1, 2)
    store_with(tmp_path / "c", [4])
    done = merge([tmp_path / "c"], tmp_path / "all")
    assert (done.records, done.added, done.known) == (5, 1, 0)
    assert merge([tmp_path / "c", one.folder], done.path).added == 0
    merged = ReferenceStore(tmp_path / "all", one.folder.name, 2)
    np.testing.assert_array_equal(merged.table(record_ids(5)), [[-i - 1, -2] for i in range(5)])
    about = json.loads((done.path / "store.json").read_text())
    assert about["fingerprint_of"] == MADE_FROM


def test_many_records_go_into_parts(tmp_path: Path) -> None:
    store = store_with(tmp_path / "a", [0])
    ids = np.random.default_rng(0).integers(0, 256, (70_000, 16), np.uint8)
    store.add(ids, np.full((70_000, 2), -3.0))
    store.flush()
    done = merge([tmp_path / "a"], tmp_path / "all")
    report = examine(done.path)
    assert (report.records, report.parts) == ({2: 70_001}, 2)


@pytest.mark.parametrize("name", MADE_FROM)
def test_stores_of_other_inputs_do_not_go_together(tmp_path: Path, name: str) -> None:
    one, other = store_with(tmp_path / "a", [0]), store_with(tmp_path / "b", [1], **{name: "another"})
    match = rf"do not go together: .*other inputs \({name}: {MADE_FROM[name]} and another\)"
    with pytest.raises(UserError, match=match):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    with pytest.raises(UserError, match=match):
        merge([one.folder], other.folder)
    assert not (tmp_path / "all").exists()


def test_conflicting_values_are_named(tmp_path: Path) -> None:
    """-3.0 against -3.000002 is within 1e-6 of 3, -2.00001 against -2 is not."""
    one = store_with(tmp_path / "a", [1, 2, 3])
    near = store_with(tmp_path / "near", [2], offset=-2e-6)
    far = store_with(tmp_path / "far", [0, 1], offset=-1e-5)
    assert merge([one.folder, near.folder], tmp_path / "all").known == 1
    before = sorted((tmp_path / "all").rglob("*"))
    with pytest.raises(UserError) as caught:
        merge([far.folder], tmp_path / "all")
    said = str(caught.value)
    assert "values of 1 records conflict by more than 1e-06" in said
    assert f"record {1:032x}: [-2.0, -2.0] in {tmp_path}/all/{one.folder.name}, [-2.0000" in said
    assert f"in {far.folder}" in said and "--tolerance" in said
    assert "the destination's own value then counts, else that of the store named first" in said
    assert sorted((tmp_path / "all").rglob("*")) == before
    done = merge([far.folder], tmp_path / "all", tolerance=1e-4)
    assert (done.added, done.known) == (1, 1)
    merged = ReferenceStore(tmp_path / "all", one.folder.name, 2)
    assert merged.values_of(record_ids(2))[1].tolist() == [-2.0, -2.0]


def test_whose_value_counts_within_the_tolerance(tmp_path: Path) -> None:
    """The destination's own, then that of the store named first."""
    first = store_with(tmp_path / "first", [1, 2], offset=-0.25)
    second = store_with(tmp_path / "second", [1, 2, 3], offset=-0.5)
    into = store_with(tmp_path / "all", [1])
    merge([first.folder, second.folder], into.folder, tolerance=0.5)
    merged = ReferenceStore(tmp_path / "all", into.folder.name, 2)
    assert merged.table(record_ids(4)[1:])[:, 0].tolist() == [-2.0, -3.25, -4.5]


@pytest.mark.parametrize("text", ["nan", "-1", "inf", "-1e-9", "little", ""])
def test_a_tolerance_that_is_none(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is read or written."""
    with pytest.raises(SystemExit) as caught:
        main(["reference", "merge", f"--tolerance={text}", str(tmp_path / "a"), str(tmp_path / "all")])
    assert caught.value.code == 2
    assert f"--tolerance: must be a finite number from 0, but is {text!r}" in capsys.readouterr().err


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    one = store_with(tmp_path / "a", [0])
    store_with(tmp_path / "a", [0], weights="w2")
    with pytest.raises(UserError, match=f"holds 2 stores.*give one of .*{one.folder.name}"):
        merge([tmp_path / "a"], tmp_path / "all")
    with pytest.raises(UserError, match="nothing does not exist; give a store"):
        merge([tmp_path / "nothing"], tmp_path / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no reference store: it holds no store\.json"):
        merge([tmp_path / "empty"], tmp_path / "all")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to, where .*/file is a file; make it writable"):
        merge([one.folder], tmp_path / "file" / "all")
    about = one.folder / "store.json"
    text = about.read_text()
    about.write_text("{")
    with pytest.raises(UserError, match=r"no store\.json that can be read.*unknown"):
        merge([one.folder], tmp_path / "all")
    about.write_text(text.replace("store 1", "store 9"))
    with pytest.raises(UserError, match="is 'nxdt-align reference store 9'"):
        merge([one.folder], tmp_path / "all")
    about.write_text(text)
    (part,) = one.folder.glob("part-*")
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"damaged parts \({part.name}: .*copy it again"):
        merge([one.folder], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_run_that_adds_values_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the destination and writing to it: every record of the source still gets there."""
    one, into = store_with(tmp_path / "a", [0, 1]), store_with(tmp_path / "all", [5])
    read = stores._all_of

    def read_then_written_to(*given: Any) -> Any:
        found = read(*given)
        store_with(tmp_path / "all", [6, 7, 8])
        return found

    monkeypatch.setattr(stores, "_all_of", read_then_written_to)
    assert merge([one.folder], into.folder).added == 2
    assert into.stored(record_ids(9)[[0, 1, 5, 6, 7, 8]]).all()


def test_a_damaged_destination_gets_its_records_again(tmp_path: Path) -> None:
    one = store_with(tmp_path / "a", [0, 1])
    shutil.copytree(tmp_path / "a", tmp_path / "all")
    (part,) = (tmp_path / "all" / one.folder.name).glob("part-*")
    part.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert merge([one.folder], tmp_path / "all").added == 2


def test_a_store_in_words(tmp_path: Path) -> None:
    store = store_with(tmp_path, [0, 1, 2])
    store.add(record_ids(4)[2:], np.full((2, 2), -1.0))
    store.flush()
    store.table(record_ids(3))
    (store.folder / "part-00009-x.safetensors").write_bytes(b"1234")
    assert find_stores(tmp_path) == find_stores(store.folder) == [store.folder]
    said = "\n".join(words(examine(store.folder)))
    assert said.startswith(f"store {store.folder}\n  model: m\n  precision: p\n")
    assert "  4 records of 2 values\n  3 parts of 0.0 MB; tables of 1 data sets\n" in said
    assert "  damaged: part-00009-x.safetensors: " in said
    (store.folder / "store.json").unlink()
    assert "store.json is missing or damaged" in "\n".join(words(examine(store.folder)))
