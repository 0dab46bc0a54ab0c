"""Which checkpoints are written when, by which value they are ranked, and which stay."""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixture import Project, assert_same_run, scalars

from nxdt_align.engines.native.checkpoint import checkpoint_step
from nxdt_align.training.module import AlignmentModule

CALLBACK = "exp_manager.checkpoint_callback_params"
SMALLEST = (f"{CALLBACK}.monitor=val_loss", f"{CALLBACK}.mode=min")
NAMED = f"{CALLBACK}.filename='run--{{step}}-{{val_loss:.6f}}'"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    import nemo.utils.exp_manager  # noqa: F401 (its log handlers keep stderr, which no test may have replaced)

    return Project.create(tmp_path_factory.mktemp("project"))


def train(project: Project, root: Path, *overrides: str) -> Path:
    assert project.train(f"exp_manager.exp_dir={root}", *overrides) == 0
    (run,) = (root / "run").glob("20*")
    return run


def kept(run: Path) -> dict[int, Path]:
    folders = [f for f in (run / "checkpoints").iterdir() if f.is_dir()]
    return {checkpoint_step(folder) or -1: folder for folder in folders}


def state(folder: Path) -> dict[str, Any]:
    """The checkpoint callback's, as the checkpoint has it."""
    callbacks = torch.load(folder / "trainer.pt", weights_only=True)["extra"]["callbacks"]
    (found,) = [value for key, value in callbacks.items() if key.startswith("NeMoModelCheckpoint")]
    return dict(found)


def ranks(folder: Path) -> dict[int, float]:
    """Step -> value, of the best that a checkpoint names."""
    return {
        int(re.findall(r"step=(\d+)", path)[0]): float(value)
        for path, value in state(folder)["best_k_models"].items()
    }


# When


@pytest.mark.parametrize("extra", [(), ("exp_manager.async_checkpointing=True",)], ids=["", "background"])
def test_one_that_is_due_at_an_epochs_last_step_is_written_there(
    project: Project, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    """Epochs of 6 steps, validation at 5 and 10: step 6 is not put off to 10."""
    every = (f"{CALLBACK}.every_n_train_steps=3", f"{CALLBACK}.save_top_k=-1", "trainer.max_steps=10")
    run = train(project, tmp_path, *every, "trainer.val_check_interval=5", *extra)
    assert sorted(kept(run)) == [3, 6, 9, 10]


def test_a_run_resumes_from_an_epochs_last_step(project: Project, tmp_path: Path) -> None:
    """Validation at 3, 6 and 9; that of step 6 was run before the end, and is not run again."""
    every = (f"{CALLBACK}.every_n_train_steps=6", "trainer.val_check_interval=4")
    whole = train(project, tmp_path / "whole", *every, "trainer.max_steps=9")
    train(project, tmp_path / "again", *every, "trainer.max_steps=6")
    assert_same_run(train(project, tmp_path / "again", *every, "trainer.max_steps=9"), whole)


# By what


@pytest.mark.parametrize("top_k", [1, 2, -1])
def test_rank_and_name_are_of_the_step_itself(project: Project, tmp_path: Path, top_k: int) -> None:
    """Validation every 3 steps, a checkpoint every 2: it validates at 2, 4 and 8 as well."""
    run = train(project, tmp_path, *SMALLEST, NAMED, f"{CALLBACK}.save_top_k={top_k}")
    losses = dict(scalars(run)["val_loss"])
    assert sorted(losses) == [2, 3, 4, 6, 8]
    saved = {step: losses[step] for step in (2, 4, 6, 8)}
    best = sorted(saved, key=lambda step: saved[step])[: top_k if top_k > 0 else None]
    found = kept(run)
    assert sorted(found) == sorted(best)
    for step, folder in found.items():
        assert folder.name == f"run--step={step}-val_loss={losses[step]:.6f}"
    newest = found[max(found)]
    assert ranks(newest)[max(found)] == pytest.approx(losses[max(found)])
    assert all(value == pytest.approx(losses[step]) for step, value in ranks(newest).items())


def test_a_name_alone_needs_its_own_value(project: Project, tmp_path: Path) -> None:
    run = train(project, tmp_path, NAMED, f"{CALLBACK}.save_top_k=-1", "trainer.max_steps=5")
    losses = dict(scalars(run)["val_loss"])
    wanted = [f"run--step={step}-val_loss={losses[step]:.6f}" for step in (2, 4, 5)]
    assert sorted(folder.name for folder in kept(run).values()) == wanted


def test_a_name_whose_value_nothing_computes_keeps_no_checkpoint_back(
    project: Project, tmp_path: Path
) -> None:
    no_data = ("data.val_dir=null", f"{CALLBACK}.save_top_k=-1", "trainer.max_steps=3")
    run = train(project, tmp_path, NAMED, *no_data)
    assert sorted(f.name for f in kept(run).values()) == [f"run--step={n}-val_loss=nan" for n in (2, 3)]


def test_a_training_metric_is_of_the_step_though_it_is_not_logged(project: Project, tmp_path: Path) -> None:
    every = train(project, tmp_path / "every", "trainer.max_steps=7")
    key = f"{CALLBACK}.monitor=reduced_train_loss"
    keep = (key, f"{CALLBACK}.mode=min", f"{CALLBACK}.save_top_k=-1", f"{CALLBACK}.filename='run--{{step}}'")
    run = train(project, tmp_path / "rare", *keep, "trainer.log_every_n_steps=5", "trainer.max_steps=7")
    losses = dict(scalars(every)["reduced_train_loss"])
    assert ranks(kept(run)[7]) == pytest.approx({step: losses[step] for step in (2, 4, 6, 7)})
    assert [step for step, _ in scalars(run)["reduced_train_loss"]] == [5]


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ((f"{CALLBACK}.every_n_epochs=1", f"{CALLBACK}.save_on_train_epoch_end=True"), [6, 8]),
        ((f"{CALLBACK}.every_n_epochs=1",), [4, 8]),
        ((f"{CALLBACK}.train_time_interval={{seconds:0}}",), list(range(1, 9))),
    ],
    ids=["an epoch's end", "after validation", "time"],
)
def test_however_a_checkpoint_is_asked_for(
    project: Project, tmp_path: Path, when: tuple[str, ...], steps: list[int]
) -> None:
    """Epochs of 6 steps, validation at 4 and 8; the last step is always validated and ranked."""
    no_steps = (f"{CALLBACK}.every_n_train_steps=null", "trainer.val_check_interval=4")
    run = train(project, tmp_path, *SMALLEST, NAMED, *no_steps, *when, f"{CALLBACK}.save_top_k=-1")
    losses = dict(scalars(run)["val_loss"])
    wanted = [f"run--step={step}-val_loss={losses[step]:.6f}" for step in steps]
    assert sorted(folder.name for folder in kept(run).values()) == wanted
    assert ranks(kept(run)[8]) == pytest.approx({step: losses[step] for step in steps}, abs=1e-6)


def test_save_last_has_a_name_of_its_own_step(project: Project, tmp_path: Path) -> None:
    run = train(project, tmp_path, *SMALLEST, NAMED, f"{CALLBACK}.save_last=True", "trainer.max_steps=5")
    losses = dict(scalars(run)["val_loss"])
    (last,) = [f.name for f in (run / "checkpoints").iterdir() if f.name.endswith("-last")]
    assert last == f"run--step=5-val_loss={losses[5]:.6f}-last"
    assert not any(math.isnan(value) for value in losses.values())


# With a restart by a signal


def test_one_for_the_restart_alone_has_no_rank_and_goes(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 5 nothing is due: the best by then, 4, stays, and 5 with its loss unknown goes at 6."""
    whole = train(project, tmp_path / "whole", *SMALLEST, NAMED, f"{CALLBACK}.save_top_k=2")
    losses = dict(scalars(whole)["val_loss"])
    original = AlignmentModule._log_step

    def log_step(module: AlignmentModule, *arguments: Any) -> None:
        original(module, *arguments)
        if module.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    again = (f"exp_manager.exp_dir={tmp_path}/again", *SMALLEST, NAMED, f"{CALLBACK}.save_top_k=2")
    with monkeypatch.context() as patched:
        patched.setattr(AlignmentModule, "_log_step", log_step)
        assert project.train(*again) == 143
    (run,) = (tmp_path / "again" / "run").glob("20*")
    assert sorted(kept(run)) == [2, 4, 5]
    assert kept(run)[5].name == "run--step=5-val_loss=nan"
    assert ranks(kept(run)[5]) == pytest.approx({2: losses[2], 4: losses[4]})
    assert project.train(*again) == 0
    assert scalars(run)["val_loss"] == scalars(whole)["val_loss"]
    assert sorted(f.name for f in kept(run).values()) == sorted(f.name for f in kept(whole).values())


def test_one_that_is_due_at_the_signal_is_ranked_after_the_restart(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 4 validation would have come first; the process that resumes runs it."""
    whole = train(project, tmp_path / "whole", *SMALLEST, NAMED, f"{CALLBACK}.save_top_k=-1")
    original = AlignmentModule._log_step

    def log_step(module: AlignmentModule, *arguments: Any) -> None:
        original(module, *arguments)
        if module.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    again = (f"exp_manager.exp_dir={tmp_path}/again", *SMALLEST, NAMED, f"{CALLBACK}.save_top_k=-1")
    with monkeypatch.context() as patched:
        patched.setattr(AlignmentModule, "_log_step", log_step)
        assert project.train(*again) == 143
    assert project.train(*again) == 0
    (run,) = (tmp_path / "again" / "run").glob("20*")
    assert scalars(run)["val_loss"] == scalars(whole)["val_loss"]
    assert ranks(kept(run)[8]) == ranks(kept(whole)[8])
    assert sorted(f.name for f in kept(run).values()) == sorted(f.name for f in kept(whole).values())
