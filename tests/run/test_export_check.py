"""An export is done when transformers computes from it what the trainer does; another one is removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_fixture import ORPO, Project, write_labelled

from nxdt_align.cli import main
from nxdt_align.run import run as run_module

CHECK = "exp_manager.check_export=True"
KTO = ("~model_alignment_strategy.dpo", "model_alignment_strategy.kto={}")
SFT = ("~model_alignment_strategy.dpo", "model_alignment_strategy.sft={}")


def said(project: Project) -> list[str]:
    """The lines of run.log that tell of the comparison."""
    text = (project.only_run() / "run.log").read_text()
    return [line for line in text.splitlines() if "transformers' log-probabilities of" in line]


@pytest.mark.parametrize(
    ("settings", "responses"),
    [
        # 22 pairs, 4 a step: step 6 is an epoch's last, step 7 another's first.
        (("trainer.max_steps=6",), 6),
        ((*ORPO, "data.packing=none"), 6),
        ((*KTO,), 6),
        ((*SFT, "data.val_dir=null"), 3),
        (("precision.type=mixed_precision",), 6),
        (("model_alignment_strategy.dpo.ld_alpha=0.3",), 6),
    ],
)
def test_an_export_says_what_the_trainer_says(
    tmp_path: Path, settings: tuple[str, ...], responses: int
) -> None:
    project = Project.create(tmp_path)
    if settings == KTO:
        write_labelled(tmp_path)
    assert project.train(CHECK, "trainer.max_steps=2", *settings) == 0
    (line,) = said(project)
    assert f"log-probabilities of {responses} responses are the trainer's" in line


def test_an_export_that_differs_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight is another on its way; the checkpoint is not touched, and exports by itself."""
    write = run_module.write_hf_folder

    def spoiled(folder: Path, config: Any, tensors: Any, **options: Any) -> None:
        def pairs() -> Any:
            for name, tensor in tensors:
                yield name, tensor + (0.5 if name.endswith("embed_tokens.weight") else 0.0)

        write(folder, config, pairs(), **options)

    monkeypatch.setattr(run_module, "write_hf_folder", spoiled)
    project = Project.create(tmp_path)
    assert project.train(CHECK, "trainer.max_steps=2", "data.val_dir=null") == 1
    error = capsys.readouterr().err
    assert "nats per token on record" in error and "was removed" in error
    run = project.only_run()
    assert not (run / "hf_export").exists()
    assert main(["export", str(run), str(tmp_path / "by_hand"), "--quiet"]) == 0


def test_what_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are too large, which is said; and where the key says so."""
    monkeypatch.setattr("nxdt_align.run.export_check.LARGEST", 1)
    project = Project.create(tmp_path)
    assert project.train(CHECK, "trainer.max_steps=1", "data.val_dir=null") == 0
    assert "the export is not read again" in (project.only_run() / "run.log").read_text()
    assert project.train("trainer.max_steps=2", "data.val_dir=null") == 0
    assert said(project) == []
    assert (project.only_run() / "hf_export" / "model.safetensors").is_file()
