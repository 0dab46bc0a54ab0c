"""docs/performance.md has what the step-time model says, and what it says of its figures is so."""

from __future__ import annotations

from nxdt_align.config.load import load_config
from scripts.performance_table import DATA, END, PAGE, PRESET, START, TRN2, figure, tables


def test_the_page_has_what_the_script_writes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0] == tables()


def test_what_the_page_concludes() -> None:
    (short, _), (long, _) = DATA.values()

    def pairs(lengths: tuple[int, ...], *overrides: str) -> float:
        return figure(load_config(PRESET, [*TRN2, *overrides]), lengths).pairs

    none, shared = "data.packing=none", "data.packing=shared_prompt"
    assert pairs(short, shared) > 20 * pairs(short, none)
    assert pairs(long, shared) < pairs(long, none) < pairs(long, shared, "data.attention=nki")
