"""scripts/plot_layouts.py: the picture in docs/packing.md shows rows as the package lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def plot_layouts(repo: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(repo / "scripts"))
    import plot_layouts

    return plot_layouts


def test_it_draws_every_layout(plot_layouts: object, tmp_path: Path) -> None:
    plot_layouts.main(["--out", str(tmp_path / "layouts.png")])  # type: ignore[attr-defined]
    assert (tmp_path / "layouts.png").stat().st_size > 10_000


def test_tokens_stand_where_the_text_says(plot_layouts: object) -> None:
    shared = plot_layouts.lay_out(plot_layouts.PANELS[2])  # type: ignore[attr-defined]
    (row,) = plot_layouts.texts(shared)  # type: ignore[attr-defined]
    assert " ".join(row).strip() == "c2 c1 c0 p3 p0 p1 p2 p3 r0 r1"
    (kinds,) = plot_layouts.kinds(shared)  # type: ignore[attr-defined]
    assert kinds == [2, 2, 2, 2, 1, 1, 1, 3, 3, 3, 0, 0]
    windowed = plot_layouts.lay_out(plot_layouts.PANELS[3])  # type: ignore[attr-defined]
    (row,) = plot_layouts.texts(windowed)  # type: ignore[attr-defined]
    assert " ".join(row).strip() == "p0 p1 p2 p3 c0 c1 c2 p0 p1 p2 p3 r0 r1"
