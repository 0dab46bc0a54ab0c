"""The site of docs/: its navigation, links and tables, and that MkDocs builds it where it is installed."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import nxdt_align
from nxdt_align.config.aliases import FOREIGN_ADVICE, FOREIGN_KEYS, LOSS_TYPES, OTHER_NAMES
from nxdt_align.config.keys import all_keys
from nxdt_align.config.megatron import MEGATRON_KEYS

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPO / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


hooks, tables = script("mkdocs_hooks"), script("site_tables")
PAGES = [*sorted(path.relative_to(REPO).as_posix() for path in DOCS.glob("**/*.md")), *hooks.ALWAYS]


def text_of(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


# Navigation and links


def navigated(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from navigated(below)


def test_every_page_is_in_the_navigation_once() -> None:
    named = list(navigated(yaml.safe_load(text_of("mkdocs.yml"))["nav"]))
    assert sorted(named) == sorted(map(hooks.in_site, PAGES))


def broken(page: str, text: str) -> list[str]:
    """Links of a page that lead nowhere, or to a heading that is not there."""
    found = []
    for target in hooks.relative_links(text):
        path, _, anchor = target.partition("#")
        there = REPO / hooks.in_repository(page, path) if path else REPO / page
        exists = there.is_file() or (there.is_dir() and page not in PAGES)
        if not exists or (anchor and anchor not in hooks.anchors(there.read_text(encoding="utf-8"))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_has_a_target(page: str) -> None:
    assert broken(page, text_of(page)) == []


def test_broken_links_are_found() -> None:
    text = (
        "# A b\n[x](data.md) [y](#a-b) [z](#c) [w](nowhere.md) ![p](no.png) [q](data.md#no) `[c](code.md)`\n"
    )
    links = [
        "[h](https://example.com/x.md)",
        "```\n[c](fence.md)\n# not a heading\n```",
        "[n](#not-a-heading)",
    ]
    assert broken("docs/models.md", "\n".join([text, *links]).replace("#a-b", "#settings-and-limits")) == [
        *("#c", "nowhere.md", "no.png", "data.md#no", "#not-a-heading")
    ]
    assert hooks.anchors("# Head: the `key`, again\n") == {"head-the-key-again"}


def test_files_outside_docs_that_pages_link_to_are_part_of_the_site() -> None:
    found = hooks.outside_files()
    assert {*hooks.ALWAYS, "examples/slurm.sbatch", "examples/quickstart.ipynb"} <= set(found)
    assert hooks.in_site("docs/data.md") == "data.md"
    assert hooks.in_site("README.md") == "repository/README.md"


# Tables that scripts write


@pytest.mark.parametrize("page", tables.BLOCKS)
def test_page_and_code_agree(page: str) -> None:
    assert tables.filled(page, text_of(page)) == text_of(page), "run scripts/site_tables.py"


def test_a_page_without_a_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"trl: scripts/site_tables\.py writes this"):
        tables.filled("docs/migration.md", "nothing")


def test_every_foreign_key_is_on_the_migration_page() -> None:
    shown = set(re.findall(r"^\| `([^`]+)` \|", text_of("docs/migration.md"), re.M))
    assert shown >= {*FOREIGN_KEYS, *FOREIGN_ADVICE, *OTHER_NAMES, *LOSS_TYPES}
    known = {*FOREIGN_KEYS, *FOREIGN_ADVICE}
    assert [name for names in tables.ORIGINS.values() for name in names if name not in known] == []
    listed = text_of("docs/migration.md").split("<!-- megatron_keys")[1].split("<!-- /megatron_keys")[0]
    assert {key.rpartition(".")[2] for key in MEGATRON_KEYS} == {
        name for row in listed.splitlines()[3:] for name in re.findall(r"`(\w+)`", row.split("|")[2])
    }


EARLIER = {
    *("rpo_alpha", "max_completion_length", "max_target_length", "max_seq_length", "warmup_ratio"),
    *("torch_dtype", "ref_model", "ref_model_name_or_path", "lora_r", "fp16", "tf32"),
    *("eval_dataset", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "evaluation_strategy"),
    *("generate_during_eval", "group_by_length", "logging_dir", "no_cuda"),
}
"""Of TRL's table: fields of earlier versions, arguments of a trainer, and BitsAndBytesConfig's."""


def fields_of(*files: Path, of: str = "") -> set[str]:
    """Fields of the classes in these files, or of the one class. Read, not imported, which takes seconds."""
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and of in ("", node.name)]
    return {
        line.target.id
        for each in classes
        for line in each.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def home_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def test_names_of_trl_are_fields_of_its_configurations() -> None:
    trl = home_of("trl")
    fields = fields_of(
        *(trl / "trainer").glob("*_config.py"),
        trl / "scripts" / "utils.py",
        home_of("transformers") / "training_args.py",
        home_of("peft") / "tuners" / "lora" / "config.py",
    )
    assert set(tables.ORIGINS["trl"]) - fields <= EARLIER


def test_every_field_of_trls_configuration_is_known_mapped_or_left_out() -> None:
    """Those of a script that trains by DPO: DPOConfig with its bases, ModelConfig, ScriptArguments."""
    trl = home_of("trl")
    own = fields_of(trl / "trainer" / "dpo_config.py", of="DPOConfig")
    own |= fields_of(trl / "trainer" / "model_config.py", of="ModelConfig")
    own |= fields_of(trl / "scripts" / "utils.py", of="ScriptArguments")
    inherited = fields_of(trl / "trainer" / "base_config.py", of="_BaseConfig")
    inherited |= fields_of(home_of("transformers") / "training_args.py", of="TrainingArguments")
    assert len(own) > 40 and len(inherited) > 100
    same = {path.rpartition(".")[2] for path, key in all_keys().items() if not key.is_section}
    assert own | inherited <= {*same, *FOREIGN_KEYS, *FOREIGN_ADVICE}


def test_the_picture_is_of_the_package_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    picture = script("plot_architecture")
    assert picture.drawing() == text_of("docs/architecture.svg"), "run scripts/plot_architecture.py"
    folders = {
        path.name for path in (REPO / "src" / "nxdt_align").iterdir() if (path / "__init__.py").is_file()
    }
    assert folders <= {room.name for room in picture.ROOMS}
    assert ("engines.nxd", "models") in picture.arrows()


# Troubleshooting and API


def said(node: ast.AST) -> str | None:
    """The text of a string in the source, with NUL for each value that is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-+.\d]*[sdg]", "\0", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) or "\0" for part in node.values)
    return None


@pytest.fixture(scope="module")
def messages() -> list[str]:
    trees = [ast.parse(path.read_text()) for path in (REPO / "src" / "nxdt_align").rglob("*.py")]
    return [text for tree in trees for node in ast.walk(tree) if (text := said(node))]


def rows_of_troubleshooting() -> list[list[str]]:
    lines = [line for line in text_of("docs/troubleshooting.md").splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]


def test_every_message_of_troubleshooting_is_in_the_code(messages: list[str]) -> None:
    quoted = [text for row in rows_of_troubleshooting() for text in re.findall(r"`([^`]+)`", row[0])]
    assert len(quoted) > 45
    for text in {*quoted} - {"nxdt-align plan"}:
        # In order, in one string, which may have more at either end and between.
        parts = [re.escape(part.strip()) for part in text.split("…") if part.strip()]
        pattern = re.compile(".*?".join(parts), re.S)
        assert any(pattern.search(message) for message in messages), text


def test_every_key_of_troubleshooting_exists() -> None:
    known, sections = set(all_keys()), {key.partition(".")[0] for key in all_keys()}
    for row in rows_of_troubleshooting():
        for name in re.findall(r"`([\w.]+)(?:=[^`]*)?`", row[-1]):
            if name.partition(".")[0] in sections and "." in name and not name.endswith(".log"):
                assert name in known, name


def test_every_public_name_is_on_the_api_page() -> None:
    shown = re.findall(r"^::: (\S+)$", text_of("docs/api.md"), re.M)
    assert {name.rpartition(".")[2] for name in shown} >= set(nxdt_align.__all__) - {"__version__"}
    for name in shown:
        module, _, attribute = name.rpartition(".")
        tree = ast.parse((REPO / "src" / f"{module.replace('.', '/')}.py").read_text())
        assert attribute in {getattr(node, "name", None) for node in tree.body}, name


# The site itself


def test_mkdocs_builds_the_site(tmp_path: Path) -> None:
    for needed in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(needed, reason="make docs installs it")
    # Not --quiet: it keeps warnings from --strict.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "memory.html").read_text()
    assert html.count("<table>") == len(re.findall(r"^\|(?:---\|)+$", text_of("docs/memory.md"), re.M))
    assert 'id="configs-of-known-models"' in html
    assert 'href="repository/examples/slurm.sbatch"' in (tmp_path / "checkpoints.html").read_text()
    assert 'href="../data.html"' in (tmp_path / "repository" / "index.html").read_text()
    assert (tmp_path / "repository" / "examples" / "slurm.sbatch").is_file()
    assert "every unknown key" in (tmp_path / "api.html").read_text()
    assert "likelihood displacement" in (tmp_path / "search" / "search_index.json").read_text()
