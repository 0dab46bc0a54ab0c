"""Atomic writes, with failures made to happen in the middle."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nxdt_align import files
from nxdt_align.files import TEMPORARY_SUFFIX, atomic_folder, atomic_write, explain, publish_folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_creates_the_folder_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    atomic_write(path, b"one")
    atomic_write(str(path), b"two")
    assert content(tmp_path) == {"a/b.bin": b"two"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "b.bin"
    atomic_write(path, b"old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert content(tmp_path) == {"b.bin": b"old"}


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "x"
    with atomic_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "f").write_bytes(b"1")
        assert not target.exists()
    assert content(tmp_path) == {"runs/x/deep/f": b"1"}
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["x"]


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_folder_replaces_whatever_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    target, other = tmp_path / "x", tmp_path / "other"
    other.mkdir()
    (other / "keep").write_bytes(b"k")
    if kind == "folder":
        target.mkdir()
        (target / "old").write_bytes(b"0")
    elif kind == "file":
        target.write_bytes(b"0")
    else:
        target.symlink_to(other)
    with atomic_folder(target) as folder:
        (folder / "new").write_bytes(b"1")
    assert content(tmp_path) == {"x/new": b"1", "other/keep": b"k"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "x"]


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt()])
def test_failed_folder_leaves_the_old_one(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").write_bytes(b"0")
    with pytest.raises(type(failure)), atomic_folder(target) as folder:
        (folder / "new").write_bytes(b"1")
        raise failure
    assert content(tmp_path) == {"x/old": b"0"}


def test_folder_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "x") as folder:
        (folder / "new").write_bytes(b"1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replace", [True, False])
def test_publish_replaces_only_what_it_may(tmp_path: Path, replace: bool) -> None:
    """A conversion keeps what is written so far; what appeared at its destination meanwhile stays."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "f").write_bytes(b"1")
    (tmp_path / "x").mkdir()
    publish_folder(tmp_path / "new", tmp_path / "x", replace=replace)
    (tmp_path / "new").mkdir(exist_ok=True)
    (tmp_path / "new" / "g").write_bytes(b"2")
    if replace:
        publish_folder(tmp_path / "new", tmp_path / "x", replace=True)
        assert content(tmp_path) == {"x/g": b"2", "new/f": b"1"}
        return
    with pytest.raises(OSError, match="not empty"):
        publish_folder(tmp_path / "new", tmp_path / "x", replace=False)
    assert content(tmp_path) == {"x/f": b"1", "new/g": b"2"}


def test_every_file_and_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "f").write_bytes(b"1")
    wanted = [tmp_path, tmp_path / "x", tmp_path / "x" / "deep", tmp_path / "x" / "deep" / "f"]
    assert {p.stat().st_ino for p in wanted} <= flushed


KILLED = """
import sys, time
from nxdt_align.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "part").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(600)
"""


def test_killed_writer_leaves_no_target_and_its_leftover_goes(tmp_path: Path) -> None:
    """The temporary stays while its writer lives, however old, and goes with the next write after it."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "x")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])},
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.endswith(TEMPORARY_SUFFIX) and leftover.name.startswith(".")
    long_ago = time.time() - 3600
    os.utime(leftover, (long_ago, long_ago))
    atomic_write(tmp_path / "other", b"1")
    assert leftover.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    atomic_write(tmp_path / "other", b"2")
    assert content(tmp_path) == {"other": b"2"} and not leftover.exists()


def test_young_temporary_is_left_alone(tmp_path: Path) -> None:
    young = tmp_path / f".x.00{TEMPORARY_SUFFIX}"
    young.mkdir()
    atomic_write(tmp_path / "other", b"1")
    assert young.exists()


def test_explain_says_what_to_do() -> None:
    assert "free some space" in explain(OSError(errno.ENOSPC, "No space left on device"))
    assert "writable" in explain(OSError(errno.EACCES, "Permission denied"))
    assert "read-only" in explain(OSError(errno.EROFS, "Read-only file system"))
    assert "strange" in explain(OSError(errno.EXDEV, "strange"))


def test_lines_are_appended_behind_whole_lines(tmp_path: Path) -> None:
    """Also behind one that a kill has cut."""
    file = tmp_path / "lines.jsonl"
    for lines in (["one"], ["two", "drei \u00fc"]):
        files.append_lines(file, lines)
    assert file.read_text(encoding="utf-8") == "one\ntwo\ndrei \u00fc\n"
    file.write_bytes(file.read_bytes() + b"cu")
    files.append_lines(file, ["three"])
    assert file.read_text(encoding="utf-8").splitlines()[-2:] == ["cu", "three"]
