"""The table of families is what its script found, and what it found is so."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import family_table as families
import pytest
from families_fixture import CONFIGS, VALUES

from nxdt_align.models.families import FAMILIES

QUICK = ("logits", "gradients", "conversion", "export")
"""Columns that take seconds."""
ALONE = (*QUICK, "dpo", "layouts")
EVERY = (*families.ROWS, *families.THEIRS)
SPREAD = ("native tp", "native pp", "native fsdp")
ON_NXD = tuple(name for name, column in families.COLUMNS.items() if column.needs_nxd)


def same_states(columns: tuple[str, ...], rows: Sequence[str] = EVERY) -> None:
    """Figures may differ from one machine to another, within the bounds that running a column holds."""
    record, now = families.read(families.RECORD), families.found(columns, rows)
    for row, cells in now.items():
        for column, cell in cells.items():
            kept = record[row][column]
            assert cell.state == kept.state, f"{row}, {column}"
            # A figure in a message may differ, too.
            assert re.sub(r"\d+%", "%", cell.said) == re.sub(r"\d+%", "%", kept.said), f"{row}, {column}"


@pytest.mark.parametrize("path", families.PAGES, ids=lambda path: path.name)
def test_a_page_shows_what_was_found(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    content = families.page_content(path, families.read(families.RECORD))
    assert families.with_table(page, content) == page, "run scripts/family_table.py --pages"


def test_no_cell_is_empty() -> None:
    record = families.read(families.RECORD)
    assert list(record) == list(EVERY)
    for row, cells in record.items():
        assert list(cells) == list(families.COLUMNS), row
        for column, cell in cells.items():
            assert cell.state in ("yes", "refused", "not applicable"), (row, column)
            # What ran has its figure; what did not, the reason.
            assert (cell.off is None) == (cell.state != "yes") == bool(cell.said), (row, column)
            if cell.off is not None:
                assert cell.off <= families.COLUMNS[column].bound, (row, column)


def test_every_family_has_a_row() -> None:
    shown = {config.model_type for config in families.ROWS.values()}
    assert shown == set(FAMILIES) == {values["model_type"] for values in VALUES.values()}


def test_a_family_of_our_decoder_is_refused_nowhere_but_for_a_librarys_limit() -> None:
    record = families.read(families.RECORD)
    refused = {(row, c) for row in families.ROWS for c, cell in record[row].items() if cell.state != "yes"}
    assert refused == {(row, "nxd pp") for row in families.ALWAYS_TIED}


@pytest.mark.parametrize("row", ["Gemma 2", "Phi-3, Phi-4", "GPT-2"])
def test_the_quick_columns(row: str) -> None:
    same_states(QUICK, [row])


def test_a_cell_over_its_bound_is_an_error() -> None:
    def over(models: Any) -> Any:
        return dict.fromkeys(models, 1.1e-5)

    column = families.Column("logits", "zero", 1e-5, over, over)
    with pytest.raises(AssertionError, match=r"Mistral, logits: 1.1e-05 is over 1e-05"):
        column.cells(["Mistral"])


def test_the_refusal_of_stages_with_a_tied_head_is_the_engines() -> None:
    said = families.read(families.RECORD)["Gemma 2"]["nxd pp"].said
    assert said == families.tied_head(CONFIGS["gemma2"])
    assert said.startswith(
        "distributed_strategy.pipeline_model_parallel_size: must be 1 for a model whose head"
    )


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path) -> Any:
    """The script, which writes copies of the record and of the pages."""
    spec = importlib.util.spec_from_file_location("fill_in", repo / "scripts" / "family_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = tuple(tmp_path / page.name for page in families.PAGES)
    for page, copy in zip(families.PAGES, pages, strict=True):
        shutil.copy(page, copy)
    shutil.copy(families.RECORD, tmp_path / "families.json")
    monkeypatch.setattr(families, "RECORD", tmp_path / "families.json")
    monkeypatch.setattr(families, "PAGES", pages)
    return module


def test_the_script_writes_pages_from_the_record(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    record, pages = families.read(families.RECORD), families.PAGES
    before = [page.read_text() for page in pages]
    assert script.main(["--pages"]) == 0
    assert [page.read_text() for page in pages] == before
    changed = dict(record)
    changed["Mistral"] = record["Mistral"] | {"dpo": families.Cell("not applicable", said="for a test")}
    families.write(changed, families.RECORD)
    assert script.main(["--pages"]) == 0
    assert all("not applicable (1) |" in page.read_text() for page in pages)
    assert "\n(1) for a test\n" in pages[0].read_text()
    # A cell that was not run yet: the pages stay, and the cell is named.
    changed["Mistral"].pop("dpo")
    families.write(changed, families.RECORD)
    before = [page.read_text() for page in pages]
    assert script.main(["--pages"]) == 1
    assert "not run yet: Mistral, dpo" in capsys.readouterr().err
    assert [page.read_text() for page in pages] == before
    with pytest.raises(SystemExit):
        script.main(["--columns", "speed"])


@pytest.mark.full
@pytest.mark.parametrize("column", [*ALONE, *SPREAD])
def test_every_cell_again(column: str) -> None:
    same_states((column,))


@pytest.mark.full
@pytest.mark.nxd
@pytest.mark.parametrize("column", ON_NXD)
def test_every_cell_of_engine_nxd_again(column: str) -> None:
    same_states((column,))
