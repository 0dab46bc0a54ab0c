"""Commands below a "run" comment on the pages of docs/ work as they are written, one after another."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from training_fixture import Project

from nxdt_align.cli import main

RUN = re.compile(r"^<!-- run -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ["index.md", "generation.md", "compare.md", "sweep.md", "report.md", "doctor.md", "reference.md"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the names that the pages use."""
    root = tmp_path_factory.mktemp("pages")
    project = Project.create(root, pairs=60)
    assert project.train("trainer.max_steps=2") == 0
    run = project.only_run()
    for name in ("my_run", "my_other_run"):
        (root / name).symlink_to(run)
    (root / "my_model").symlink_to(run / "hf_export")
    (root / "my_pairs.jsonl").symlink_to("train.jsonl")
    (root / "my_prompts.jsonl").write_text('{"prompt": "it was"}\n{"prompt": "he is"}\n')
    return root


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(
    page: str, folder: Path, repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    blocks = RUN.findall((repo / "docs" / page).read_text())
    commands = [line for block in blocks for line in block.splitlines() if line]
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "nxdt-align"
        assert main(arguments) == 0, capsys.readouterr().err
