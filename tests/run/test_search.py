"""Which folder a run goes on in, and from which checkpoint: by identity and not by name, the newest that is
whole, and never silently from step 0."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damage import DAMAGE, junk
from native_checkpoint_fixture import SHARD, as_earlier_version, content, parameters, trained

from nxdt_align.engines.native import checkpoint as native
from nxdt_align.engines.native.saving import save
from nxdt_align.engines.nxd import checkpoint as nxd
from nxdt_align.errors import UserError
from nxdt_align.run.folder_lock import LOCK, FolderLock
from nxdt_align.run.resume import (
    IDENTITY_FILE,
    RUN_RECORD,
    RunFolder,
    RunIdentity,
    read_identity,
    run_identity,
    write_identity,
)
from nxdt_align.run.search import find

PARTS: dict[str, Any] = {
    "objective": {"dpo": {"kl_beta": 0.1, "loss_weights": None}, "orpo": None},
    "data": "hash of the records",
    "order": [7, 4],
    "model": {"hidden_size": 32},
}
THIS = RunIdentity(PARTS)
OLD, NEW = "2026-01-01_00-00-00", "2026-01-02_00-00-00"
NXD_SHARD = "model/dp_rank_00_tp_rank_00_pp_rank_00.pt"


class Alone:
    """What the search asks of an engine, on one process."""

    topology = SimpleNamespace(rank=0, world_size=1)

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def save_native(folder: Path, extra: dict[str, Any]) -> None:
    net, optimizer = trained()
    save(folder, parameters(net), optimizer, extra)


def save_nxd(folder: Path, extra: dict[str, Any]) -> None:
    """The files that NxD writes for one rank."""
    for shard in (NXD_SHARD, NXD_SHARD.replace("model", "optim")):
        (folder / shard).parent.mkdir(parents=True)
        torch.save({"weight": torch.arange(1000.0)}, folder / shard)
    torch.save(extra, folder / nxd.EXTRA)
    (folder / "checkpoint").write_text("1")
    (folder / nxd.DONE).write_text("1")
    nxd.SUMMARY.write(folder, nxd.description(extra, {"tensor": 1}, True))


SAVERS = {native: save_native, nxd: save_nxd}


def make_run(
    parent: Path, date: str, *steps: int, parts: dict[str, Any] = PARTS, engine: Any = native
) -> Path:
    folder = parent / date
    write_identity(folder, run_identity(parts), parts)
    for step in steps:
        extra = {"global_step": step, RUN_RECORD: {"identity": run_identity(parts)}}
        SAVERS[engine](folder / "checkpoints" / f"step={step}", extra)
    return folder


@contextmanager
def searched(
    parent: Path,
    *,
    identity: RunIdentity = THIS,
    engine: Any = native,
    explicit: Path | None = None,
    resume: bool = True,
    may_be_new: bool = True,
) -> Iterator[RunFolder]:
    settings = SimpleNamespace(resume_if_exists=resume, resume_ignore_no_checkpoint=may_be_new)
    config, places = SimpleNamespace(exp_manager=settings), SimpleNamespace(runs=parent, explicit=explicit)
    arguments: Any = (config, places, identity, engine, Alone())
    with find(*arguments) as found:
        yield found


def look(parent: Path, **how: Any) -> RunFolder:
    with searched(parent, **how) as found:
        return found


def refusal(parent: Path, **how: Any) -> str:
    """The message; nothing may have changed but for locks."""
    before = {k: v for k, v in content(parent).items() if LOCK.name not in k}
    with pytest.raises(UserError) as error:
        look(parent, **how)
    assert {k: v for k, v in content(parent).items() if LOCK.name not in k} == before
    return str(error.value)


# The right folder


def test_newest_folder_of_the_same_identity_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path, OLD, 10)
    wanted = make_run(tmp_path, NEW, 4, 20)
    make_run(tmp_path, "2026-01-03_00-00-00", 99, parts={**PARTS, "order": [1, 1]})
    assert look(tmp_path) == RunFolder(wanted, wanted / "checkpoints" / "step=20")


def test_without_resume_or_checkpoint_a_new_folder_is_made(tmp_path: Path) -> None:
    """NxDT's DPO and ORPO YAMLs are both called hf_llama: the name says nothing. What an NxDT run has left
    under the name has no identity, and is not ours."""
    make_run(tmp_path, OLD, 10)
    make_run(tmp_path, NEW, parts={**PARTS, "data": "x"})
    (tmp_path / "2026-01-04_00-00-00" / "checkpoints" / "hf_llama--step=5" / "model").mkdir(parents=True)
    before = sorted(tmp_path.iterdir())
    for how in ({"resume": False}, {"identity": RunIdentity({**PARTS, "data": "x"})}):
        with searched(tmp_path, **how) as run:
            assert run.checkpoint is None and run.path.is_dir() and run.path not in before
        assert not run.path.exists(), "a run that stops early leaves nothing"
    assert "resume_ignore_no_checkpoint: is False" in refusal(
        tmp_path, identity=RunIdentity({**PARTS, "data": "x"}), may_be_new=False
    )


def test_a_checkpoint_of_the_other_engine_is_not_resumed(tmp_path: Path, caplog: Any) -> None:
    folder = make_run(tmp_path, OLD, 2, engine=nxd)
    assert look(tmp_path).checkpoint is None
    assert f"{folder / 'checkpoints' / 'step=2'} is a checkpoint of engine nxd: skipped" in caplog.messages


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"objective": {"dpo": {"kl_beta": 0.3, "loss_weights": None}, "orpo": None}},
            "Different objective: model_alignment_strategy.dpo.kl_beta was 0.1 and is 0.3. A new",
        ),
        (
            {"objective": {"dpo": None, "orpo": {"beta": 0.2}}},
            "Different objective: model_alignment_strategy.dpo.kl_beta was 0.1 and is not there, "
            "model_alignment_strategy.orpo.beta was not there and is 0.2. A new",
        ),
        (
            {"data": "another"},
            "Different data: the records of data.train_dir (their text, number or order). A new",
        ),
        ({"order": (7, 8)}, "Different order: data.global_batch_size was 4 and is 8. A new"),
        ({"order": [8, 4]}, "Different order: seed was 7 and is 8. A new"),
        (
            {"model": {"hidden_size": 64}, "start": "x"},
            "Different model: hidden_size was 32 and is 64; start: start weights",
        ),
    ],
    ids=["beta", "objective", "data", "batch", "seed", "two parts"],
)
def test_a_run_that_is_not_resumed_is_named_with_what_differs(
    tmp_path: Path, changed: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path, NEW, 4, parts={**PARTS, "objective": None, "data": "far", "order": [1, 1]})
    near = make_run(tmp_path, OLD, 4)
    assert look(tmp_path, identity=RunIdentity({**PARTS, **changed})).checkpoint is None
    (warning,) = caplog.messages
    assert warning.startswith(f"not resumed: {near}, whose newest checkpoint is step=4, is another run. ")
    assert named in warning


def test_runs_without_checkpoints_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path, OLD)
    look(tmp_path, identity=RunIdentity({**PARTS, "order": [1, 1]}))
    look(tmp_path / "missing")
    assert not caplog.messages and not (tmp_path / "missing").exists()


# Damage


FILES = [
    *((native, name) for name in ("checkpoint.json", "trainer.pt", "tensors/.metadata", SHARD)),
    *((nxd, name) for name in (nxd.SUMMARY.name, nxd.EXTRA, nxd.DONE, NXD_SHARD)),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Of each engine, one with steps 2 and 4."""
    places = {engine: tmp_path_factory.mktemp("runs") for engine in SAVERS}
    for engine, place in places.items():
        make_run(place, OLD, 2, 4, engine=engine)
    return places


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(("engine", "name"), FILES, ids=[f"{e.__name__[18:21]}-{n}" for e, n in FILES])
def test_damage_to_the_newest(
    runs: dict[Any, Path], tmp_path: Path, engine: Any, name: str, how: str, caplog: Any
) -> None:
    """The older one, and a warning; where there is none, a message that names what is wrong."""
    parent = tmp_path / "run"
    shutil.copytree(runs[engine], parent)
    newest, older = (parent / OLD / "checkpoints" / f"step={step}" for step in (4, 2))
    DAMAGE[how](newest / name)
    damaged = content(newest)
    assert look(parent, engine=engine).checkpoint == older
    fault, going_on = caplog.messages
    assert fault.startswith("not resumed from: ") and str(newest) in fault and name in fault
    assert going_on == f"resuming from step 2 instead, {older}"
    assert content(newest) == damaged

    shutil.rmtree(older)
    said = refusal(parent, engine=engine)
    for words in ("no checkpoint of this run in", name, "Restore one", "exp_manager.resume_if_exists=False"):
        assert words in said
    explicit = refusal(parent, engine=engine, explicit=parent / OLD)
    assert name in explicit and "with another exp_manager.explicit_log_dir" in explicit
    assert look(parent, engine=engine, resume=False).path.name != OLD


@pytest.mark.parametrize("engine", SAVERS, ids=["native", "nxd"])
def test_a_file_of_another_checkpoint_of_the_same_size(
    runs: dict[Any, Path], tmp_path: Path, engine: Any
) -> None:
    """What a copy that broke off leaves: whole files of different steps, of equal size."""
    shutil.copytree(runs[engine], tmp_path / "run")
    newest, older = (tmp_path / "run" / OLD / "checkpoints" / f"step={step}" for step in (4, 2))
    name = native.TRAINER if engine is native else nxd.EXTRA
    assert (newest / name).stat().st_size == (older / name).stat().st_size
    shutil.copy(older / name, newest / name)
    assert look(tmp_path / "run", engine=engine).checkpoint == older


@pytest.mark.parametrize(("engine", "name"), FILES[1:4] + FILES[5:6] + FILES[7:], ids=lambda v: str(v)[-12:])
def test_checkpoints_of_earlier_versions(
    runs: dict[Any, Path], tmp_path: Path, engine: Any, name: str
) -> None:
    """They have no checksums of their own: resumed, and judged by those that torch writes."""
    shutil.copytree(runs[engine], tmp_path / "run")
    newest, older = (tmp_path / "run" / OLD / "checkpoints" / f"step={step}" for step in (4, 2))
    for checkpoint in (newest, older):
        as_earlier_version(checkpoint, engine.SUMMARY)
    assert look(tmp_path / "run", engine=engine).checkpoint == newest
    data = bytearray((newest / name).read_bytes())
    at = data.find(b"global_step") if b"global_step" in data else len(data) // 2
    data[at] ^= 1
    if name.endswith(".metadata"):
        data = bytearray(b"\x80\x04" + b"g" * (len(data) - 2))
    (newest / name).write_bytes(data)
    assert look(tmp_path / "run", engine=engine).checkpoint == older


@pytest.mark.full
@pytest.mark.parametrize("digests", [True, False], ids=["digests", "earlier version"])
@pytest.mark.parametrize("engine", SAVERS, ids=["native", "nxd"])
def test_any_byte(runs: dict[Any, Path], tmp_path: Path, engine: Any, digests: bool) -> None:
    """Each 37th byte of each file, flipped: the older checkpoint, always; of an earlier version, never a
    traceback."""
    shutil.copytree(runs[engine], tmp_path / "run")
    newest, older = (tmp_path / "run" / OLD / "checkpoints" / f"step={step}" for step in (4, 2))
    if not digests:
        as_earlier_version(newest, engine.SUMMARY)
    for path in [f for f in newest.rglob("*") if f.is_file()]:
        data = path.read_bytes()
        for at in range(0, len(data), 37):
            spoiled = bytearray(data)
            spoiled[at] ^= 1 << (at % 8)
            path.write_bytes(spoiled)
            found = look(tmp_path / "run", engine=engine).checkpoint
            assert found == older or not digests, (path, at)
        path.write_bytes(data)


SPOILED_IDENTITIES: dict[str, Callable[[Path], Any]] = {
    **DAMAGE,
    "other types": lambda path: path.write_text('{"identity": 1, "of": {}}'),
    "half": lambda path: path.write_text('{"identity": "a"}'),
    "other content": lambda path: path.write_text(path.read_text().replace("32", "33")),
}


@pytest.mark.parametrize("how", SPOILED_IDENTITIES)
def test_a_lost_identity(runs: dict[Any, Path], tmp_path: Path, how: str, caplog: Any) -> None:
    """The checkpoints say it, too; where they cannot, nobody knows, and nothing starts."""
    shutil.copytree(runs[native], tmp_path / "run")
    folder = tmp_path / "run" / OLD
    newest = folder / "checkpoints" / "step=4"
    SPOILED_IDENTITIES[how](folder / IDENTITY_FILE)
    assert look(tmp_path / "run").checkpoint == newest
    (warning,) = caplog.messages
    assert IDENTITY_FILE in warning and "its checkpoints say that it is this run" in warning
    assert look(tmp_path / "run", explicit=folder).checkpoint == newest
    other = RunIdentity({**PARTS, "order": [1, 1]})
    assert look(tmp_path / "run", identity=other).checkpoint is None
    assert "holds checkpoints of another run" in refusal(tmp_path / "run", identity=other, explicit=folder)

    for checkpoint in (folder / "checkpoints").iterdir():
        junk(checkpoint / "trainer.pt")
    for how_to in ({}, {"explicit": folder}):
        said = refusal(tmp_path / "run", **how_to)
        assert IDENTITY_FILE in said and "do not say either which run they are of: restore the file" in said
    assert "exp_manager.resume_if_exists=False" in refusal(tmp_path / "run")

    # A run of this identity that is whole goes on, whatever lies beside it.
    caplog.clear()
    wanted = make_run(tmp_path / "run", NEW, 6)
    assert look(tmp_path / "run").path == wanted
    assert any("they are not looked at" in message for message in caplog.messages)


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    (tmp_path / IDENTITY_FILE).write_text("{")
    with pytest.raises(UserError, match=r"run_identity.json is damaged"):
        read_identity(tmp_path)


# Other runs, and what killed ones leave


def test_a_run_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path, OLD, 4)
    with FolderLock(folder):
        said = refusal(tmp_path)
        assert f"{folder} is in use: process {os.getpid()} on " in said
        assert "exp_manager.resume_if_exists=False starts another run" in said
        explicit = refusal(tmp_path, explicit=folder)
        assert "choose another exp_manager.explicit_log_dir" in explicit
        assert look(tmp_path, resume=False).path != folder
        assert look(tmp_path, identity=RunIdentity({**PARTS, "order": [1, 1]})).path != folder
    assert look(tmp_path).path == folder


def leave_temporaries(folder: Path) -> list[Path]:
    """As kills leave them, this very moment."""
    names = (
        *("checkpoints/.step=6.0123abcd.nxdt-tmp", "checkpoints/.removing-step=1"),
        *("checkpoints/.step=4.0123abcd.nxdt-old", ".hf_export.0123abcd.nxdt-tmp"),
    )
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_bytes(bytes(1000))
    (folder / f".{IDENTITY_FILE}.0123abcd.nxdt-tmp").write_bytes(b"{")
    return [folder / name for name in names] + [folder / f".{IDENTITY_FILE}.0123abcd.nxdt-tmp"]


@pytest.mark.parametrize("resume", [True, False])
def test_temporaries_of_killed_saves_go(tmp_path: Path, resume: bool) -> None:
    """Those of this run, also where it was killed before its first checkpoint; not those of others, nor
    those of a folder that is in use."""
    ours, first = make_run(tmp_path, NEW, 2, 4), make_run(tmp_path, OLD)
    in_use = make_run(tmp_path, "2025-01-01_00-00-00")
    other = make_run(tmp_path, "2025-01-02_00-00-00", parts={**PARTS, "order": [1, 1]})
    gone = [*leave_temporaries(ours), *leave_temporaries(first)[:2]]
    kept = [*leave_temporaries(other), *leave_temporaries(in_use)]
    with FolderLock(in_use):
        assert look(tmp_path, resume=resume).path.exists() == resume
    assert not [path for path in gone if path.exists()]
    assert all(path.exists() for path in kept)


def test_what_was_displaced_gets_its_name_back(tmp_path: Path) -> None:
    """A crash between the two renames of a file system that cannot swap names."""
    folder = make_run(tmp_path, OLD, 4)
    checkpoint = folder / "checkpoints" / "step=4"
    checkpoint.rename(folder / "checkpoints" / ".step=4.0123abcd.nxdt-old")
    assert look(tmp_path) == RunFolder(folder, checkpoint)


def test_the_summary_says_nothing_that_a_reader_of_earlier_versions_would_stop_at(
    runs: dict[Any, Path],
) -> None:
    said = json.loads((runs[native] / OLD / "checkpoints" / "step=4" / "checkpoint.json").read_text())
    assert said["version"] == 1 and said["files"].keys() == said["crc32"].keys()
    assert all(isinstance(size, int) for size in said["files"].values())
