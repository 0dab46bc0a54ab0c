"""Which folder a run goes on in: by identity, newest first, never by name."""

from __future__ import annotations

from pathlib import Path

from nxdt_align.run.resume import find_run, newest_checkpoint, run_identity, write_identity


def step_of(folder: Path) -> int | None:
    """A stand-in for reading a checkpoint: its step is in its name; 'broken' ones are not whole."""
    return None if "broken" in folder.name else int(folder.name.split("=")[1])


def make_run(parent: Path, date: str, identity: str, *checkpoints: str) -> Path:
    folder = parent / date
    write_identity(folder, identity, {"objective": identity})
    for name in checkpoints:
        (folder / "checkpoints" / name).mkdir(parents=True)
    return folder


def test_newest_folder_of_the_same_identity_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path, "2026-01-01_00-00-00", "dpo", "step=10")
    wanted = make_run(tmp_path, "2026-01-02_00-00-00", "dpo", "step=4", "step=20", "step=30-broken")
    make_run(tmp_path, "2026-01-03_00-00-00", "orpo", "step=99")
    run = find_run(tmp_path, "dpo", step_of, resume=True)
    assert run.path == wanted and run.checkpoint == wanted / "checkpoints" / "step=20"


def test_another_objective_under_the_same_name_starts_anew(tmp_path: Path) -> None:
    """NxDT's DPO and ORPO YAMLs are both called hf_llama."""
    make_run(tmp_path, "2026-01-01_00-00-00", "dpo", "step=10")
    run = find_run(tmp_path, "orpo", step_of, resume=True)
    assert run.checkpoint is None and run.path.parent == tmp_path and not run.path.exists()


def test_without_resume_or_checkpoint_a_new_folder_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, "2026-01-01_00-00-00", "dpo", "step=10")
    make_run(tmp_path, "2026-01-02_00-00-00", "empty")
    assert find_run(tmp_path, "dpo", step_of, resume=False).checkpoint is None
    assert find_run(tmp_path, "empty", step_of, resume=True).checkpoint is None


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    first = find_run(tmp_path, "a", step_of, resume=False).path
    first.mkdir()
    second = find_run(tmp_path, "a", step_of, resume=False).path
    assert second != first


def test_a_half_removed_checkpoint_is_not_one(tmp_path: Path) -> None:
    (tmp_path / ".removing-step=9").mkdir()
    assert newest_checkpoint(tmp_path, step_of) is None


def test_identity_depends_on_every_part_and_not_on_their_order() -> None:
    base = {"objective": {"dpo": {"kl_beta": 0.1}}, "data": "x", "start": "y"}
    assert run_identity(base) == run_identity(dict(reversed(list(base.items()))))
    for key in base:
        assert run_identity({**base, key: "other"}) != run_identity(base)
