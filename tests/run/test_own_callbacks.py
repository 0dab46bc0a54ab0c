"""``trainer.callbacks``: Lightning callbacks of the user's own, by dotted path."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_fixture import Project

MODULE = """
from lightning.pytorch import Callback

class Watch(Callback):
    def __init__(self, file="seen.txt", every=1):
        self.file, self.every = file, every
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step % self.every == 0:
            open(self.file, "a").write(f"{trainer.global_step} ")

class NotOne: pass
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_callbacks.py").write_text(MODULE)
    return Project.create(tmp_path)


def test_they_are_called_with_their_settings(project: Project) -> None:
    paths = "[own_callbacks.Watch, {path: own_callbacks.Watch, settings: {file: every.txt, every: 2}}]"
    assert project.train("trainer.max_steps=4", f"trainer.callbacks={paths}") == 0
    assert (project.root / "seen.txt").read_text().split() == ["1", "2", "3", "4"]
    assert (project.root / "every.txt").read_text().split() == ["2", "4"]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            "own_callbacks.NotOne",
            "must be a subclass of lightning.pytorch.callbacks.callback.Callback, but is type",
        ),
        ("own_callbacks.Missing", "own_callbacks has no Missing; it has Callback, Watch, NotOne"),
        (
            "no_such.Callback",
            "cannot import the module no_such (ModuleNotFoundError: No module named 'no_such')",
        ),
        (
            "{path: own_callbacks.Watch, settings: {speed: 3}}",
            "created with settings {'speed': 3}: ",
        ),
    ],
)
def test_an_unfit_one_stops_the_run_before_a_model_is_made(
    project: Project, capsys: pytest.CaptureFixture[str], callback: str, message: str
) -> None:
    assert project.train(f"trainer.callbacks=[{callback}]") == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: trainer.callbacks: ") and message in said
    assert not (project.root / "experiments").exists()
