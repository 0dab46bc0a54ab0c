"""Commands below a "run" comment on the pages of docs/ work as they are written, one after another; the
others parse, and their configurations load, but for files that are the reader's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from training_fixture import Project

from nxdt_align.cli import main
from nxdt_align.cli_parser import parse
from nxdt_align.config.check import with_check
from nxdt_align.config.load import presets, read_config
from nxdt_align.config.sweep import combinations, key_by_name

REPO = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^(?P<mark><!-- run -->\n)?```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: Path, *, marked: bool) -> list[str]:
    """Lines of the bash blocks, continued ones whole; ``marked`` are those below a "run" comment."""
    blocks = [match["text"] for match in BLOCK.finditer(page.read_text()) if bool(match["mark"]) == marked]
    return [line for text in blocks for line in text.replace("\\\n", " ").splitlines() if line]


DOCS = sorted((REPO / "docs").glob("*.md"))
PAGES = [page.name for page in DOCS if commands(page, marked=True)]
UNMARKED = [
    (page.name, line)
    for page in (REPO / "README.md", *DOCS)
    for line in commands(page, marked=False)
    if line.startswith("nxdt-align ")
]


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
    for command in commands(repo / "docs" / page, marked=True):
        program, *arguments = shlex.split(command, comments=True)
        assert program == "nxdt-align"
        assert main(arguments) == 0, capsys.readouterr().err


def test_pages_with_commands_are_found() -> None:
    assert {"index.md", "configuration.md", "conversion.md", "sweep.md"} <= set(PAGES) and len(PAGES) >= 9
    assert {"graphs.md", "memory.md", "packing.md", "models.md", "trn2.md", "README.md"} <= {
        page for page, _ in UNMARKED
    }


@pytest.mark.parametrize(("page", "command"), UNMARKED)
def test_a_command_that_is_not_run_is_one(page: str, command: str, repo: Path) -> None:
    """In this process: a run of it takes a model that is not here, or minutes."""
    arguments = parse(shlex.split(command, comments=True)[1:])
    name = getattr(arguments, "config_name", None)
    if name is None:
        return
    known = {preset for preset, _ in presets(repo / "conf")}
    overrides = list(arguments.overrides)
    if arguments.verb == "sweep":
        overrides = list(combinations(overrides, lambda key: key_by_name(key, "dpo"))[-1].overrides)
    # conf/run.yaml is the reader's own.
    stands_in = name if name in known else "hf_llama3_8B_DPO_config"
    config, faults = read_config(stands_in, overrides, repo / "conf")
    engine = config.distributed_strategy.engine
    faults = with_check(config, faults, engine=None if engine == "auto" else engine)
    assert [str(fault) for fault in faults if not fault.is_missing_path] == []
    if getattr(arguments, "lengths", None) is not None:  # which reads no data, and downloads nothing
        assert [str(fault) for fault in faults if not fault.path.startswith("data.")] == []
