"""What README.md tells a reader to type works, and what it points to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"^(?P<mark><!-- run -->\n)?```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(*, marked: bool) -> list[str]:
    """Lines of the bash blocks; `marked` ones are those below a "run" comment."""
    blocks = [match for match in BLOCK.finditer(README.read_text()) if bool(match["mark"]) == marked]
    return [line for block in blocks for line in block["text"].splitlines()]


@pytest.mark.parametrize("command", commands(marked=True))
def test_marked_command_runs(command: str, repo: Path, tmp_path: Path) -> None:
    """With the interpreter of this test in the place of an installed console script."""
    assert command.startswith("nxdt-align "), "the only program whose commands are run here"
    script = tmp_path / "bin" / "nxdt-align"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nxdt_align "$@"\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(repo / "src"),
    }
    done = subprocess.run(
        ["bash", "-euc", command], cwd=repo, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_some_commands_are_marked() -> None:
    assert len(commands(marked=True)) >= 3


def test_make_targets_exist(repo: Path) -> None:
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", README.read_text()))
    assert {"demo", "demo-orpo", "test", "check"} <= targets
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=repo, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_scripts_of_the_commands_exist(repo: Path) -> None:
    lines = commands(marked=False)
    assert "cd examples" in lines
    started = [line.split()[0] for line in lines if line.startswith("./")]
    assert started == ["./train.sh"]
    assert os.access(repo / "examples" / "train.sh", os.X_OK)


def test_links_and_folders_exist(repo: Path) -> None:
    text = README.read_text()
    links = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    layout = text.split("## Layout", 1)[1].split("\n\n", 2)[1]
    cells = [row.split("|")[1] for row in layout.splitlines()[2:]]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    folders = [name if (repo / name).exists() else f"src/nxdt_align/{name}" for name in names]
    assert links and names
    assert [path for path in [*links, *folders] if not leads_somewhere(repo, path)] == []


def leads_somewhere(repo: Path, link: str) -> bool:
    """A path, and after ``#`` one of its headings in GitHub's words."""
    path, _, heading = link.partition("#")
    if not heading:
        return (repo / path).exists()
    headings = re.findall(r"^#+ (.*)$", (repo / path).read_text(), re.M)
    return heading in [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]


def test_it_holds_no_path_of_one_machine() -> None:
    assert re.findall(r"(?:/home/|/root/|/tmp/)\S*", README.read_text()) == []
