"""Who holds a run's folder: one process, and nobody once it is gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from nxdt_align.run import folder_lock
from nxdt_align.run.folder_lock import LOCK, FolderInUseError, FolderLock, claim_dated


def _hold(folder: Path, results: multiprocessing.SimpleQueue[str]) -> None:
    with FolderLock(folder):
        results.put("held")
        signal.pause()


def _claim(parent: Path, stamp: str, results: multiprocessing.SimpleQueue[str]) -> None:
    folder_lock.DATE_FORMAT = stamp
    with claim_dated(parent) as held:
        (held.folder / "file").write_text("")
        results.put(held.folder.name)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    arguments = (tmp_path / "run", "now", results)
    processes = [context.Process(target=_claim, args=arguments) for _ in range(12)]
    for process in processes:
        process.start()
    names = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert sorted(names) == sorted(["now", *(f"now-{count}" for count in range(2, 13))])


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    process = context.Process(target=_hold, args=(tmp_path, results))
    process.start()
    assert results.get() == "held"
    with pytest.raises(FolderInUseError, match=f"is in use: process {process.pid} on .*; do this"):
        FolderLock(tmp_path, "; do this")
    process.kill()
    process.join()
    with FolderLock(tmp_path):
        pass


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    """As a data loader's worker that outlives its process for some seconds would."""
    child = 0
    try:
        with FolderLock(tmp_path):
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
        with FolderLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file says who holds it: a process of this node is looked for, one of another node is warned of."""
    monkeypatch.setattr(folder_lock, "lock", lambda descriptor: None)
    with FolderLock(tmp_path) as held:
        assert not held.is_sure
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
            FolderLock(tmp_path)
        own = json.loads((tmp_path / LOCK).read_text())
    for gone in ({"started": "1"}, {"pid": 2**22 + 1}):  # another process of this number; none
        (tmp_path / LOCK).write_text(json.dumps({**own, **gone}))
        with FolderLock(tmp_path):
            pass
    assert not caplog.messages
    (tmp_path / LOCK).write_text(json.dumps({**own, "host": "another"}))
    with FolderLock(tmp_path):
        pass
    (message,) = caplog.messages
    assert "has no locks; whether a process on another still runs there is unknown" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"host": 1}', "[" * 5000])
def test_what_is_in_the_file_does_not_matter(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).parent.mkdir()
    (tmp_path / LOCK).write_text(content)
    with FolderLock(tmp_path), pytest.raises(FolderInUseError):
        FolderLock(tmp_path)
    assert (tmp_path / LOCK).read_text() == ""


def test_folders_that_nothing_was_written_into_go(tmp_path: Path) -> None:
    with claim_dated(tmp_path / "experiments" / "run") as held:
        assert held.folder.is_dir()
    assert not (tmp_path / "experiments").exists()
    with FolderLock(tmp_path):
        pass
    assert tmp_path.is_dir(), "it was there before"
