"""The benchmark of the verdict's rules: its cases, and its counts by hand; what it measures is no test."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nxdt_align.evaluation.verdict import RULES as FUNCTIONS

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))


def test_every_rule_has_cases() -> None:
    from verdict_cases import CASES, DATA, RULES

    assert len(CASES) >= 40 and len({case.name for case in CASES}) == len(CASES)
    shown = Counter(rule for case in CASES for rule in case.shows)
    assert set(shown) == set(RULES) and len(RULES) == len(FUNCTIONS) and min(shown.values()) >= 5
    assert sum(not case.shows for case in CASES) >= 10
    assert {case.data for case in CASES} == set(DATA)
    assert all(not case.shows & case.open for case in CASES)


def test_counts_by_hand() -> None:
    """Noise: found in one of the two runs that show it, and in a good one; not judged in the fourth."""
    from verdict_cases import LENGTH, NOISE, Case
    from verdicts import Found, scores, tables

    def found(name: str, shows: set[str], rules: set[str], open: set[str] | None = None) -> Any:
        return Found(Case(name, frozenset(shows), frozenset(open or ())), frozenset(rules), "It.", 1.0)

    every = [
        found("a", {NOISE}, {NOISE}),
        found("b", {NOISE}, set()),
        found("c", set(), {NOISE}),
        found("d", {LENGTH}, {LENGTH, NOISE}, {NOISE}),
        found("e", set(), set()),
    ]
    by_rule = {score.rule: score for score in scores(every)}
    noise = by_rule[NOISE]
    assert (noise.right, noise.wrong, noise.missed) == (1, 1, 1)
    assert noise.precision == noise.recall == 0.5
    assert by_rule[LENGTH].precision == by_rule[LENGTH].recall == 1.0
    assert by_rule["overfitting"].precision is None
    text = tables(every)
    assert "| data noise | 2 | 1 | 1 | 1 | 0.50 | 0.50 |" in text
    assert (
        "1 of 2 good runs have no finding that they should not have." in text
        and "| c | nothing | data noise (!)" in text
    )


def test_changed_data(tmp_path: Path) -> None:
    """Lengths and labels as the names say, the same on every call."""
    from verdict_cases import DATA, write_data

    pairs = [{"prompt": f"p{i}", "chosen": f"a b {i}", "rejected": f"c {i}"} for i in range(200)]
    for split in ("train", "heldout"):
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (tmp_path / f"{split}.jsonl").write_text(text)

    def read(name: str) -> tuple[list[dict[str, str]], ...]:
        files = write_data(tmp_path, name)
        assert [f.read_bytes() for f in files] == [f.read_bytes() for f in write_data(tmp_path, name)]
        return tuple([json.loads(line) for line in f.read_text().splitlines()] for f in files)

    train, heldout = read("the longer is chosen")
    assert all(len(pair["chosen"]) > len(pair["rejected"]) for pair in train)
    assert 60 < sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in heldout) < 140
    train, _ = read("half are flipped")
    assert 60 < sum(new != old for new, old in zip(train, pairs, strict=True)) < 140
    train, _ = read("nearly alike")
    assert all(pair["rejected"] != pair["chosen"] for pair in train)
    assert len(read("32 pairs")[0]) == 32 and read("as they are")[0] == pairs
    assert set(DATA) >= {"16 flipped pairs"}
