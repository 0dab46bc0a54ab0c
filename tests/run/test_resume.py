"""Which folder a run goes on in: by identity, newest first, never by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_fixture import Project, scalars, write_pairs

from nxdt_align.config.start import IDENTITY_FILE
from nxdt_align.errors import UserError
from nxdt_align.run.resume import (
    RunIdentity,
    _warn_of_other_runs,
    find_run,
    newest_checkpoint,
    read_identity,
    run_identity,
    write_identity,
)
from nxdt_align.training.resumed import ResumedSchedule


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    import nemo.utils.exp_manager  # noqa: F401 (its log handlers keep stderr, which no test may have replaced)

    return Project.create(tmp_path_factory.mktemp("project"))


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


PARTS: dict[str, Any] = {
    "objective": {"dpo": {"kl_beta": 0.1, "loss_weights": None}, "orpo": None},
    "data": "hash of the records",
    "order": [7, 4],
    "model": {"hidden_size": 32},
}


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
    far = tmp_path / "2026-01-02_00-00-00"
    write_identity(far, "far", {**PARTS, "objective": None, "data": "far", "order": [1, 1]})
    near = tmp_path / "2026-01-01_00-00-00"
    write_identity(near, run_identity(PARTS), PARTS)
    for folder in (near, far):
        (folder / "checkpoints" / "step=4").mkdir(parents=True)
    _warn_of_other_runs(tmp_path, RunIdentity({**PARTS, **changed}), step_of)
    (warning,) = caplog.messages
    assert warning.startswith(f"not resumed: {near}, whose newest checkpoint is step=4, is another run. ")
    assert named in warning


def test_runs_without_checkpoints_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_identity(tmp_path / "2026-01-01_00-00-00", run_identity(PARTS), PARTS)
    _warn_of_other_runs(tmp_path, RunIdentity({**PARTS, "order": [1, 1]}), step_of)
    _warn_of_other_runs(tmp_path / "missing", RunIdentity(PARTS), step_of)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.global_batch_size=2", "data.global_batch_size was 4 and is 2"),
        ("model_alignment_strategy.dpo.kl_beta=0.2", "dpo.kl_beta was 0.3 and is 0.2"),
        ("data.train_dir={root}/other.jsonl", "the records of data.train_dir"),
    ],
)
def test_train_says_so(
    project: Project, override: str, named: str, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    where = (f"exp_manager.exp_dir={project.root}/experiments", "trainer.max_steps=2")
    if not project.runs():
        assert project.train(*where) == 0
    first = project.runs()[0]
    write_pairs(project.root / "other.jsonl", 22, seed=5)
    changed = override.format(root=project.root)
    caplog.clear()
    assert project.train(*where, changed) == 0
    (warning,) = [m for m in caplog.messages if m.startswith("not resumed")]
    assert str(first) in warning and named in warning
    capsys.readouterr()
    explicit = f"exp_manager.explicit_log_dir={first}"
    assert project.train(*where, explicit, changed) == 1
    said = capsys.readouterr().err
    assert "holds checkpoints of another run. Different " in said and named in said


UNSET = "model.optim.sched.max_steps=null"


@pytest.mark.parametrize(
    ("overrides", "wanted", "named"),
    [
        (
            ("trainer.max_steps=8", UNSET),
            [3e-3 * (8 - step) / 6 for step in range(4, 8)],
            [
                "model.optim.sched.max_steps was 4 and is 8: this counts from step 5 on, whose learning rate "
                "is 0.002"
            ],
        ),
        (
            ("trainer.max_steps=8", "model.optim.sched.max_steps=4", "model.optim.lr=5e-4"),
            [0.0] * 4,
            ["model.optim.lr was 0.003 and is 0.0005: this counts from step 5 on, whose learning rate is 0"],
        ),
        (
            ("trainer.max_steps=6", "model.optim.sched.name=WarmupHoldPolicy", "model.optim.lr=5e-4"),
            [5e-4] * 2,
            [
                "model.optim.lr was 0.003 and is 0.0005: this counts",
                "model.optim.sched.name was LinearAnnealingWithWarmUp and is WarmupHoldPolicy: this counts",
                "model.optim.sched.max_steps was 4 and is 20: this counts",
            ],
        ),
        (
            ("trainer.max_steps=6", "~model.optim.sched"),
            [3e-3] * 2,
            [
                "model.optim.sched.name was LinearAnnealingWithWarmUp and is null: this counts",
                "model.optim.sched.max_steps was 4 and is null: this counts",
                "model.optim.sched.warmup_steps was 2 and is null: this counts",
            ],
        ),
        (
            ("trainer.max_steps=6", "model.optim.weight_decay=0.5", "model.optim.sched.max_steps=4"),
            [0.0] * 2,
            ["model.optim.weight_decay is 0.5 in the YAML, but the checkpoint's 0.01 stays"],
        ),
    ],
    ids=["longer", "rate", "another schedule", "no schedule", "decay"],
)
def test_the_yamls_schedule_counts_from_the_first_resumed_step(
    project: Project,
    tmp_path: Path,
    overrides: tuple[str, ...],
    wanted: list[float],
    named: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Four steps up to 3e-3 and down to 0 at the fourth; warm-up 2."""
    where = f"exp_manager.exp_dir={tmp_path}/experiments"
    assert project.train(where, "trainer.max_steps=4", UNSET) == 0
    (run,) = (tmp_path / "experiments" / "run").glob("20*")
    caplog.clear()
    assert project.train(where, *overrides) == 0
    found = [value for _, value in scalars(run)["lr"]]
    assert found == pytest.approx([0.0, 1.5e-3, 3e-3, 1.5e-3, *wanted])
    said = [m for m in caplog.messages if m.startswith("model.optim")]
    assert len(said) == len(named)
    assert all(message.startswith(start) for message, start in zip(said, named, strict=True))


def test_a_schedule_where_there_was_none(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint has no schedule's state; step 5 of the new one stands at 4, and not at its start."""
    where = f"exp_manager.exp_dir={tmp_path}/experiments"
    assert project.train(where, "trainer.max_steps=4", "~model.optim.sched") == 0
    (run,) = (tmp_path / "experiments" / "run").glob("20*")
    assert project.train(where, "trainer.max_steps=6", UNSET) == 0
    found = [value for _, value in scalars(run)["lr"]]
    assert found == pytest.approx([3e-3] * 4 + [1.5e-3, 0.75e-3])
    assert any(m.startswith("model.optim.sched.name was null and is Linear") for m in caplog.messages)


def test_an_unchanged_yaml_says_nothing(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = f"exp_manager.exp_dir={tmp_path}/experiments"
    for steps in (2, 4):
        assert project.train(where, f"trainer.max_steps={steps}") == 0
    assert not [m for m in caplog.messages if m.startswith("model.optim")]


def test_a_checkpoint_that_does_not_tell_its_settings() -> None:
    """As versions before this one wrote it: the rates tell whether something changed."""
    resumed = ResumedSchedule(None, {"_last_lr": [0.002]})
    assert resumed.changes({"lr": "0.003"}, 0.002) == []
    assert resumed.changes({"lr": "0.003"}, 0.001) == [
        "model.optim changed: the checkpoint's learning rate for the next step was 0.002"
    ]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"identity": 1, "of": {}}', '{"identity": "a"}', "\x00"]
)
def test_a_damaged_identity_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / IDENTITY_FILE).write_text(content)
    with pytest.raises(UserError, match=r"run_identity.json is damaged .*; restore the file, or move"):
        read_identity(tmp_path)
