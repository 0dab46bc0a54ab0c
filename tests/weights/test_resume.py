"""Conversions in a process that is killed: nothing there that a loader takes, and ``resume`` goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_fixture import CONFIG, SIZES, MakeHF, fresh, run, same_folders
from killed_conversion import KINDS, kill_a_conversion

from nxdt_align import files
from nxdt_align.errors import UserError
from nxdt_align.weights import convert, staging
from nxdt_align.weights.detect import open_source
from nxdt_align.weights.digests import RECORD
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.staging import JOURNAL

WEIGHTS = len(fresh(CONFIG))


@pytest.mark.parametrize("moment", ["writing", "finishing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_conversion_goes_on(kind: str, moment: str, make_hf: MakeHF, tmp_path: Path) -> None:
    make_hf(CONFIG)
    left = kill_a_conversion(kind, moment, tmp_path)
    with pytest.raises(UserError, match="leftover of an interrupted conversion"):
        open_source(left, tmp_path / "hf" / "config.json")
    report = run(tmp_path / "hf", tmp_path / "out", **KINDS[kind], resume=True, verify=False)
    assert report.verified, "what was written by another process is always read back"
    assert report.resumed == WEIGHTS if moment == "finishing" else 1 <= report.resumed < WEIGHTS
    run(tmp_path / "out", tmp_path / "back", to="hf")
    same_folders(tmp_path / "hf", tmp_path / "back")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["back", "hf", "out"]
    if kind != "hf":  # which has no checksums
        run(tmp_path / "hf", tmp_path / "at once", **KINDS[kind])
        assert (tmp_path / "out" / RECORD).read_bytes() == (tmp_path / "at once" / RECORD).read_bytes()


def test_a_killed_conversion_is_cleared_away_without_resume(make_hf: MakeHF, tmp_path: Path) -> None:
    make_hf(CONFIG)
    kill_a_conversion("plain shards", "finishing", tmp_path)
    assert run(tmp_path / "hf", tmp_path / "out", to="hf").resumed == 0
    same_folders(tmp_path / "hf", tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "out"]


def test_a_journal_that_is_damaged_is_named_and_does_not_stop_a_new_start(
    make_hf: MakeHF, tmp_path: Path
) -> None:
    make_hf(CONFIG)
    left = kill_a_conversion("plain shards", "writing", tmp_path)
    journal = left / JOURNAL
    journal.write_text(journal.read_text() + "\0\0\n")
    with pytest.raises(WeightsError, match=r"conversion.jsonl is damaged: call again without --resume"):
        run(tmp_path / "hf", tmp_path / "out", **SIZES, resume=True)
    assert run(tmp_path / "hf", tmp_path / "out", **SIZES).resumed == 0


def test_all_is_on_the_device_before_anything_says_that_it_is_whole(
    make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without verification, which flushes on its own."""
    flushed: list[bool] = []
    flush = files.flush_tree

    def watching(folder: Path) -> None:
        flushed.append((folder / "done").exists())
        flush(folder)

    for module in (convert, staging):
        monkeypatch.setattr(module, "flush_tree", watching)
    run(make_hf(CONFIG), tmp_path / "out", **SIZES, verify=False)
    assert flushed == [False, True]
