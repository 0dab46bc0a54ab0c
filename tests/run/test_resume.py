"""Which run a run is, and with which schedule it goes on; test_search.py has the folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_fixture import Project, scalars, write_pairs

from nxdt_align.run.resume import run_identity
from nxdt_align.training.resumed import ResumedSchedule


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    import nemo.utils.exp_manager  # noqa: F401 (its log handlers keep stderr, which no test may have replaced)

    return Project.create(tmp_path_factory.mktemp("project"))


def test_identity_depends_on_every_part_and_not_on_their_order() -> None:
    base = {"objective": {"dpo": {"kl_beta": 0.1}}, "data": "x", "start": "y"}
    assert run_identity(base) == run_identity(dict(reversed(list(base.items()))))
    for key in base:
        assert run_identity({**base, key: "other"}) != run_identity(base)


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
