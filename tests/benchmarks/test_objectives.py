"""The benchmark of objectives: few steps on little data; its scores are no test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from demo.evaluate import Likelihoods
from demo.prepare import Sizes

from nxdt_align.config.alignment import OBJECTIVES, DPOLossType

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))


def test_every_objective_and_form_has_an_entry() -> None:
    from objective_settings import ENTRIES

    forms = {str(entry.settings.get("loss_type")) for entry in ENTRIES}
    assert forms >= set(get_args(DPOLossType))
    assert {entry.objective for entry in ENTRIES} == set(OBJECTIVES)
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_the_page_has_every_entry_and_a_picture() -> None:
    from objective_settings import ENTRIES

    page = REPO / "docs" / "objectives_benchmark.md"
    rows = {line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("|")}
    assert rows >= {entry.name for entry in ENTRIES}
    assert page.with_suffix(".png").stat().st_size < 300_000


def test_the_picture_has_every_row_of_the_table() -> None:
    """The best objective at the top, each at the table's figures: dpo's 2.48 at beta 0.5 is 4.96 nats."""
    from objective_picture import draw, read_table
    from objective_settings import ENTRIES

    text = (REPO / "docs" / "objectives_benchmark.md").read_text()
    before, rows = read_table(text)
    assert {row.name for row in rows} == {entry.name for entry in ENTRIES} and before == 50.9
    (dpo,) = [row for row in rows if row.name == "dpo"]
    assert (dpo.right, dpo.gap) == (91.6, pytest.approx(4.96))
    right, _ = draw(text).axes
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names == [row.name for row in rows] and rows[-1].right == max(row.right for row in rows)
    with pytest.raises(ValueError, match="no table of objectives"):
        read_table("# Title\n")


def test_rewards_by_hand() -> None:
    """Log-probs -4 of 2 tokens and -3 of 3, reference -6 and -1, beta 0.5: ratios 2 and -2, means -2, -1."""
    from objective_settings import Entry
    from objectives import implied_rewards

    policy = Likelihoods(*(np.array([value]) for value in (-4.0, -3.0, 2.0, 3.0)))
    reference = Likelihoods(*(np.array([value]) for value in (-6.0, -1.0, 2.0, 3.0)))
    wanted = {"log-ratio": (1.0, -1.0), "log p": (-2.0, -1.5), "log p a token": (-1.0, -0.5)}
    for reward, values in wanted.items():
        found = implied_rewards(Entry("x", "dpo", {"kl_beta": 0.5}, reward), policy, reference)  # type: ignore[arg-type]
        assert (found.chosen[0], found.rejected[0]) == values
    assert Entry("x", "sft").scale == 1.0
    assert Entry("x", "dpo", {"gamma": 0.05, "kl_beta": 0.5}).scale == 0.05


Main = Callable[..., int]


@pytest.fixture
def small_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """The script on few records, steps and warm-up steps, in a folder of the test's."""
    import objective_runs
    import objectives

    monkeypatch.setattr(objective_runs, "SIZES", Sizes(sft=64, train=128, heldout=8))
    common = ["--steps", "2", "--warmup-steps", "2", "--jobs", "2", "--folder", str(tmp_path / "runs")]
    return lambda *arguments: objectives.main([*common, *arguments])


@pytest.mark.full
def test_two_objectives_make_a_table_a_file_and_a_picture(
    small_main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import objectives

    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- results -->old<!-- end of results -->\nbehind\n")
    assert small_main("--only", "dpo; kto", "--page", str(page)) == 0
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nbehind\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["", "---", "dpo", "kto"]
    assert rows[3] in capsys.readouterr().out
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((tmp_path / "runs" / "result.json").read_text())["results"]
    for result in results:
        assert result["steps"] == [0, 1, 2] and len(result["accuracies"]) == 3
        assert result["loss_steps"] == [1, 2] and len(result["losses"]) == 2
        assert result["accuracies"][-1] == result["accuracy"] and result["accuracy_before"] == 0.5

    def no_training(*_: object) -> float:
        raise AssertionError("trained again")

    monkeypatch.setattr(objectives, "train", no_training)
    assert small_main("--only", "kto;dpo", "--reuse") == 0
    again = json.loads((tmp_path / "runs" / "result.json").read_text())["results"]
    assert again == results


def test_what_does_not_fit_is_said(
    small_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_main("--only", "dpo;grpo") == 1
    assert "--only: no objective 'grpo'; there are sft; dpo; " in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    assert small_main("--only", "dpo", "--page", str(page)) == 1
    assert f"--page: {page} has no <!-- results -->" in capsys.readouterr().err
    assert small_main("--only", "dpo", "--steps", "0") == 1
    assert "--steps must be at least 1, but is 0" in capsys.readouterr().err


def test_a_run_that_fails_shows_its_last_words(
    small_main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import objectives

    config = objectives.warmup_config

    def broken(bench: object) -> object:
        made = config(bench)  # type: ignore[arg-type]
        made.model.optim.lr = -1.0
        return made

    monkeypatch.setattr(objectives, "warmup_config", broken)
    assert small_main("--only", "dpo") == 1
    message = capsys.readouterr().err
    assert "error: warmup_2 failed with status 1" in message and "model.optim.lr" in message
