"""Large data: prepared once, found again, resumed after a kill, and never wrongly used."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
import time
import zipfile
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from data_hashes import OF_OBJECTIVE, hashes, make_module, write_sources
from small_tokenizers import CHATML, make_tokenizer

from nxdt_align.data import mismatched_parts, preparation, prepared, source_index, token_parts
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.reading import Source
from nxdt_align.data.records import DataError
from nxdt_align.data.source_identity import Stamp
from nxdt_align.data.tokenize import Tokenization, Truncation
from nxdt_align.errors import UserError
from nxdt_align.files import one_at_a_time
from nxdt_align.messages import NOTICE

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "LARGE", 0)
    monkeypatch.setattr(token_parts, "RECORDS", 23)
    write_sources(tmp_path)


def made(folder: Path, *overrides: str, sources: str = "@/plain.jsonl") -> ModelAlignmentDataModule:
    return make_module(folder, sources, *overrides, cache=folder / "cache" / "tokens")


def no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads or tokenizes a source from now on fails."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the stored tokens were not used")

    for each in (preparation, mismatched_parts):
        monkeypatch.setattr(each, "make_parts", refuse)


def test_what_is_ready_is_found_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under another name, in another time, and behind a weight."""
    want = hashes(made(tmp_path))
    no_more(monkeypatch)
    assert hashes(made(tmp_path)) == want
    assert hashes(made(tmp_path, "data.verify_cache=True")) == want
    (tmp_path / "plain.jsonl").rename(tmp_path / "moved.jsonl")
    os.utime(tmp_path / "moved.jsonl", (1, 1))
    assert hashes(made(tmp_path, sources="@/moved.jsonl")) == want
    twice = made(tmp_path, sources="[{path: @/moved.jsonl, weight: 2}]")
    assert len(twice.splits["train"].examples) == 2 * 162


@pytest.mark.parametrize("kind", ["pair", "unpaired"])
def test_what_was_read_whole_is_trusted_from_then_on(
    tmp_path: Path, kind: Literal["pair", "unpaired"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source of another time or place is hashed once, and the checksums of a file of tokens of another time
    are computed once; again where nothing could be written, or while another run tokenizes."""
    hashed: list[str] = []
    checked: list[str] = []
    whole, testzip = Stamp.whole.func, zipfile.ZipFile.testzip  # type: ignore[attr-defined]

    def hash_counted(stamp: Stamp) -> str:
        hashed.append(stamp.path)
        return str(whole(stamp))

    def check_counted(archive: zipfile.ZipFile) -> str | None:
        checked.append(str(archive.filename))
        return testzip(archive)

    counted = cached_property(hash_counted)
    counted.__set_name__(Stamp, "whole")
    monkeypatch.setattr(Stamp, "whole", counted)
    tokenization = Tokenization(make_tokenizer(template=CHATML), Truncation(64, 32))
    plain, moved = tmp_path / "plain.jsonl", tmp_path / "moved.jsonl"

    def start(path: Path, verify: bool = False) -> preparation.Ready:
        settings = preparation.Settings(kind, None, None, tokenization, verify)
        if kind == "pair":
            return preparation.PreparedSources(settings, tmp_path / "tokens").ready([str(path)])[str(path)]
        mixture = mismatched_parts.Mixture((Source(str(path)),), 1)
        return mismatched_parts.PreparedMixture(settings, tmp_path / "tokens").ready([mixture])[mixture]

    def starts(*arguments: Any) -> list[tuple[int, int]]:
        """Of two starts one after the other, how often each reads all of a source, and of its tokens."""
        counts = []
        for _ in range(2):
            hashed.clear()
            checked.clear()
            found = start(*arguments)
            for name in ("rows", "labels"):
                np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
            np.testing.assert_array_equal(found.columns.response_tokens, want.columns.response_tokens)
            counts.append((len(hashed), len(checked)))
        return counts

    want = start(plain)
    assert (want.rows if kind == "pair" else want.labels) is not None, "there is an array beside the index"
    monkeypatch.setattr(zipfile.ZipFile, "testzip", check_counted)
    no_more(monkeypatch)
    (tokens,) = (tmp_path / "tokens").glob("*.npz")
    (lock,) = (tmp_path / "sources").glob("*.lock")
    (index,) = (tmp_path / "sources").glob("*.json")
    assert starts(plain) == [(0, 0), (0, 0)]
    os.utime(plain, (1, 1))
    with one_at_a_time(lock):
        assert starts(plain) == [(1, 0), (1, 0)], "it does not wait for the other"
    assert starts(plain) == [(1, 0), (0, 0)]
    os.utime(tokens, (1, 1))
    assert starts(plain) == [(0, 1), (0, 0)]
    assert starts(plain, True) == [(1, 0), (1, 0)]
    plain.rename(moved)
    with monkeypatch.context() as patched:
        patched.setattr(source_index, "atomic_write", refuse_to_write)
        assert starts(moved) == [(1, 0), (1, 0)]
    assert starts(moved) == [(1, 0), (0, 0)]
    # The new index stands for itself: that of the old place may go, with what is beside it.
    for each in lock.parent.glob(f"{index.stem}*"):
        each.unlink()
    assert starts(moved) == [(0, 0), (0, 0)]


def refuse_to_write(*_: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_an_index_that_another_process_wrote_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a source that was touched and the lock."""
    made(tmp_path)
    (index,) = (tmp_path / "cache" / "sources").glob("*.json")
    newer = json.loads(index.read_text()) | {"whole": "of another content"}
    os.utime(tmp_path / "plain.jsonl", (1, 1))
    renew = preparation.Preparation._renew

    def later(self: Any) -> None:
        index.write_text(json.dumps(newer))
        renew(self)

    monkeypatch.setattr(preparation.Preparation, "_renew", later)
    made(tmp_path)
    assert json.loads(index.read_text()) == newer


MIXTURE = "[{path: @/chats.jsonl, weight: 0.5}, {path: @/plain.jsonl, weight: 1.5}, @/special.jsonl]"


def test_labelled_completions_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each beside another one's completion, as when all of them are held; mapped, and found again."""
    rows = [
        {
            "prompt": "a" if i < 60 else f"{i} {i % 7}",
            "completion": f"{'x' if i % 3 else i} so",
            "label": i % 2,
        }
        for i in range(140)
    ]
    (tmp_path / "special.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kto = OF_OBJECTIVE["kto"]
    want = hashes(make_module(tmp_path, MIXTURE, *kto, layout="packed"))
    for _ in range(2):
        module = made(tmp_path, *kto, "data.packing=packed", sources=MIXTURE)
        assert hashes(module) == want
        examples = module.splits["train"].examples
        assert examples._parts[0].path is not None and isinstance(examples._desirable, np.memmap)
        no_more(monkeypatch)


def test_a_completion_that_finds_no_other_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": c, "label": True} for p, c in ("ax", "ay", "bx")]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"data.train_dir: .*few.jsonl:1: KTO needs another prompt's comp"):
        made(tmp_path, *OF_OBJECTIVE["kto"], sources="@/few.jsonl")


def test_a_source_that_changed_under_its_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said, and no old token is used. A change that leaves size, time and sample alike needs
    verify_cache."""
    old = hashes(made(tmp_path))
    file = tmp_path / "plain.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with caplog.at_level(logging.INFO):
        new = hashes(made(tmp_path))
    assert new["ids"] != old["ids"] and "has changed since its tokens were stored" in caplog.text
    content = file.read_text() + json.dumps({"prompt": "a", "chosen": "b", "rejected": "c " * 150_000}) + "\n"
    file.write_text(content)
    long = hashes(made(tmp_path))
    then = file.stat()
    file.write_text(content.replace("c " * 500, "d " * 500, 1))
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert hashes(made(tmp_path)) == long, "what is trusted"
    assert hashes(made(tmp_path, "data.verify_cache=True"))["ids"] != long["ids"]


def test_another_tokenizer_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    import data_hashes

    other = data_hashes.make_tokenizer(template=data_hashes.CHATML)
    other.add_tokens(["colour"])
    monkeypatch.setattr(data_hashes, "make_tokenizer", lambda **_: other)
    with_cache = hashes(made(tmp_path))
    assert with_cache == hashes(make_module(tmp_path, "@/plain.jsonl"))


def test_a_store_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once."""
    caplog.set_level(logging.INFO)
    want = hashes(made(tmp_path))
    (index,) = (tmp_path / "cache" / "sources").glob("*.json")
    about = json.loads(index.read_text()) | {"version": 999}
    index.write_text(json.dumps(about))
    assert hashes(made(tmp_path)) == want
    assert caplog.text.count("is of another version of nxdt-align") == 1
    index.write_text("no JSON")
    assert hashes(made(tmp_path)) == want
    assert caplog.text.count("is damaged") == 1
    no_more(monkeypatch)
    assert hashes(made(tmp_path)) == want


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "rows"])
def test_a_damaged_store_is_made_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    want = hashes(made(tmp_path))
    (tokens,) = (tmp_path / "cache" / "tokens").glob("*.npz")
    (rows,) = (tmp_path / "cache" / "sources").glob("*.rows.npy")
    content = bytearray(tokens.read_bytes())
    if damage == "cut":
        tokens.write_bytes(content[:-1000])
    elif damage == "flip":
        content[len(content) // 2] ^= 0xFF
        tokens.write_bytes(content)
    else:
        (tokens if damage == "gone" else rows).unlink()
    with caplog.at_level(logging.INFO):
        assert hashes(made(tmp_path)) == want
    assert "tokenizing again" in caplog.text


def test_a_killed_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with its processes after some parts: these are kept, and the result is the same."""
    encode = Tokenization.encode

    def slowly(self: Tokenization, records: Any) -> Any:
        time.sleep(0.2)
        return encode(self, records)

    with monkeypatch.context() as patched:
        patched.setattr(Tokenization, "encode", slowly)
        child = FORK.Process(target=made, args=(tmp_path,))
        child.start()
        sources = tmp_path / "cache" / "sources"
        deadline = time.monotonic() + 60
        while len(list(sources.glob("*.parts/part-*.npz"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    time.sleep(0.5)
    kept = sorted(sources.glob("*.parts/part-*.npz"))
    time.sleep(0.5)
    assert sorted(sources.glob("*.parts/part-*.npz")) == kept, "no process was left behind"
    assert 3 <= len(kept) < 8
    kept[0].write_bytes(kept[0].read_bytes()[:-50])  # as if the disk had failed: it is made again
    submitted: list[Path] = []
    submit = token_parts.Pool.submit

    def counted(self: Any, path: Path, *rest: Any) -> Any:
        submitted.append(path)
        return submit(self, path, *rest)

    monkeypatch.setattr(token_parts.Pool, "submit", counted)
    found = hashes(made(tmp_path))
    assert set(submitted) & set(kept) == {kept[0]}
    assert found == hashes(make_module(tmp_path, "@/plain.jsonl"))
    assert not list(sources.glob("*.parts"))


def _prepare_into(folder: Path, results: Any, tokenized: Any) -> None:
    encode = Tokenization.encode

    def counted(self: Tokenization, records: Any) -> Any:
        with tokenized.get_lock():
            tokenized.value += len(records)
        return encode(self, records)

    Tokenization.encode = counted  # type: ignore[method-assign]
    results.put(hashes(made(folder)))


def test_two_runs_at_once_share_the_work(tmp_path: Path) -> None:
    results, tokenized = FORK.Queue(), FORK.Value("i", 0)
    runs = [FORK.Process(target=_prepare_into, args=(tmp_path, results, tokenized)) for _ in range(3)]
    for run in runs:
        run.start()
    found = [results.get(timeout=120) for _ in runs]
    for run in runs:
        run.join()
    assert found[0] == found[1] == found[2]
    assert tokenized.value == 162, "each record once"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While parts are written; then there is room again, and nothing is done twice or wrongly."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module in (token_parts, preparation):
        with monkeypatch.context() as patched:
            patched.setattr(module, "atomic_file", full)
            with pytest.raises(DataError, match=r"cannot be written \(data\.cache_dir\): the disk is full"):
                made(tmp_path)
    assert hashes(made(tmp_path)) == hashes(make_module(tmp_path, "@/plain.jsonl"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be written \(data\.cache_dir\): a part of the path is a fi"):
        made(tmp_path)


def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Tokenization, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(DataError, match="a process that tokenizes was killed, probably since the mach"):
            made(tmp_path)
    assert len(made(tmp_path).splits["train"].examples) == 162


def test_a_process_that_is_killed_while_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its death is then found by handing it the next part, not by waiting for one."""
    waited_for: list[Future[Path]] = []
    submit, blocks = token_parts.Pool.submit, token_parts.blocks

    def kept(self: Any, *rest: Any) -> Any:
        waited_for.append(submit(self, *rest))
        return waited_for[-1]

    def slowly(rows: Any) -> Any:
        for block in blocks(rows):
            if waited_for:
                waited_for[0].exception(timeout=60)
            yield block

    monkeypatch.setattr(Tokenization, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(token_parts.Pool, "submit", kept)
    monkeypatch.setattr(token_parts, "blocks", slowly)
    with pytest.raises(DataError, match="a process that tokenizes was killed, probably since the mach"):
        made(tmp_path)
    assert len(waited_for) == 1, "the second part was refused"


def test_bad_records_stop_the_run_and_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the words of data that are read at once; the next run need not tokenize to say so."""
    with pytest.raises(UserError) as want:
        make_module(tmp_path, "@/plain.jsonl", "data.on_bad_record=error")
    for _ in range(2):
        with pytest.raises(UserError) as found:
            made(tmp_path, "data.on_bad_record=error")
        assert str(found.value) == str(want.value)
        no_more(monkeypatch)
    assert len(made(tmp_path).splits["train"].examples) == 162


def test_a_source_without_a_usable_record(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"data.train_dir: 3 bad of 3 records[\s\S]*a source has no usable"):
        made(tmp_path, sources="@/bad.jsonl")


def test_hundreds_of_files_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is added, or another weight, makes for no tokenization of the others."""
    lines = (tmp_path / "special.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.jsonl").write_text(
            json.dumps({"prompt": f"{number} a", "chosen": "b", "rejected": "c"}) + "\n" + lines[number % 50]
        )

    def sources(count: int, weight: float) -> str:
        listed = (f"{{path: {folder}/{n}.jsonl, weight: {weight}}}" for n in range(count))
        return f"[{', '.join(listed)}]"

    first = made(tmp_path, sources=sources(59, 0.5))
    assert len(first.splits["train"].examples) == 59
    made_now: list[str] = []
    make_parts = preparation.make_parts

    def counted(*arguments: Any) -> Any:
        made_now.append(arguments[-1])
        return make_parts(*arguments)

    monkeypatch.setattr(preparation, "make_parts", counted)
    second = made(tmp_path, sources=sources(60, 3.0))
    assert len(second.splits["train"].examples) == 360 and made_now == [f"{folder}/59.jsonl"]
    assert hashes(second) == hashes(make_module(tmp_path, sources(60, 3.0)))


def _with_few_descriptors(folder: Path, sources: str, is_hard: bool, results: Any) -> None:
    limit = len(os.listdir("/dev/fd")) + 18
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit if is_hard else hard))
    try:
        results.put(len(made(folder, sources=sources).splits["train"].examples))
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")


def test_more_files_than_descriptors(tmp_path: Path) -> None:
    """The soft limit is raised; where the hard one is as low, a message names it. In processes of their own,
    which cannot raise it again."""
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    for number in range(14):
        (tmp_path / f"{number}.jsonl").write_text(row * 2)  # equal records: each file has one of rows, too
    sources = f"[{', '.join(f'@/{number}.jsonl' for number in range(14))}]"
    results = FORK.SimpleQueue()
    found = []
    for is_hard in (True, False, True):
        run = FORK.Process(target=_with_few_descriptors, args=(tmp_path, sources, is_hard, results))
        run.start()
        found.append(results.get())
        run.join()
    assert found[1] == 28
    for told in (found[0], found[2]):  # while the files are prepared, and when they are found again
        assert told.startswith("DataError: data.train_dir: ") and "ulimit -n" in told
    assert "Too many open files" in found[2] and "broken" not in found[2]


def test_tokens_that_cannot_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation.Preparation, "_open", lambda *_: None)
    with pytest.raises(DataError, match=r"tokens-.*npz cannot be read again; is the disk of data\.cache_di"):
        made(tmp_path)


def test_what_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Packed files count ten times; a data set of the Hub stands in the way, and is told where it matters."""
    monkeypatch.setattr(prepared, "LARGE", 1000)
    sizes = {
        "a.jsonl": 999,
        "b.jsonl": 1000,
        "c.jsonl.gz": 99,
        "d.JSON.GZ": 100,
        "e.parquet": 100,
        "f.jsonl": 9,
    }
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))

    def is_large(*names: str) -> bool:
        return prepared.is_large([Source(n if "/" in n else str(tmp_path / n)) for n in names])

    large = [name for name in sizes if is_large(name)]
    assert large == ["b.jsonl", "d.JSON.GZ", "e.parquet"]
    assert is_large("c.jsonl.gz", "f.jsonl", "a.jsonl") and not is_large("c.jsonl.gz", "f.jsonl")
    with caplog.at_level(logging.INFO):
        assert not is_large("a.jsonl", "some/set") and not is_large("b.jsonl", "./gone.jsonl")
        assert not caplog.records, "small; and what reads them says what is not there"
        assert not is_large("b.jsonl", "some/set:train")
    (said,) = caplog.records
    assert said.levelno == NOTICE and said.getMessage().startswith(
        "some/set:train is no file here: the whole"
    )
