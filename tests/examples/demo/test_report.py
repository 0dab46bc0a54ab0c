"""The report's figures, verdict and next steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from demo.evaluate import Evaluation, Likelihoods, Pair
from demo.report import Places, Report, describe, main, next_steps, read_beta

from nxdt_align.errors import UserError


def _pairs(count: int) -> list[Pair]:
    letters = "abcdefghij"
    return [Pair(f"Write these letters backwards: {a} k l.", f"l k {a}", f"{a} k l") for a in letters[:count]]


def _evaluation(pairs: Sequence[Pair], chosen: Sequence[float], right: Sequence[bool]) -> Evaluation:
    """Rejected responses at -2 nats, chosen ones as given; every response has 4 tokens."""
    n = len(pairs)
    likelihoods = Likelihoods(np.array(chosen, float), np.full(n, -2.0), np.full(n, 4.0), np.full(n, 4.0))
    texts = tuple(p.chosen if ok else p.rejected for p, ok in zip(pairs, right, strict=True))
    return Evaluation(likelihoods, texts, tuple(right))


def _report(good_pairs: int, right: int) -> Report:
    """Ten pairs, of which DPO raised ``good_pairs`` chosen responses and now completes ``right`` rightly."""
    pairs = _pairs(10)
    before = _evaluation(pairs, [-2] * 10, [True] * 5 + [False] * 5)
    chosen = [-1] * good_pairs + [-3] * (10 - good_pairs)
    return Report("dpo", 0.5, pairs, before, _evaluation(pairs, chosen, [i >= 10 - right for i in range(10)]))


def test_the_table_shows_figures_before_and_after() -> None:
    """Nine chosen responses gained 1 nat and one lost 1: margin 0.5 * (9 - 1) / 10 = 0.4."""
    text = describe(_report(good_pairs=9, right=8))
    figures = {" ".join(line.split()[:-2]): line.split()[-2:] for line in text.splitlines()[1:5]}
    assert figures["reward accuracy"] == ["0.500", "0.900"]
    assert figures["reward margin"] == ["+0.000", "+0.400"]
    assert figures["right completions"] == figures["reverse"] == ["50.0%", "80.0%"]
    assert "backwards: f k l.\n    before: f k l\n    after:  l k f" in text


def test_the_verdict_needs_accuracy_and_a_gain() -> None:
    assert _report(good_pairs=9, right=8).shortfalls() == []
    assert _report(good_pairs=8, right=8).shortfalls() == [
        "held-out reward accuracy must be at least 0.9, but is 0.800"
    ]
    assert _report(good_pairs=10, right=5).shortfalls() == [
        "the share of right completions must rise by at least 10%, but went from 50.0% to 50.0%"
    ]


def test_figures_that_are_not_numbers_never_pass() -> None:
    report = _report(good_pairs=10, right=9)
    logps = replace(report.after.likelihoods, chosen=np.full(10, np.nan))
    assert report.shortfalls() == []
    broken = replace(report, after=replace(report.after, likelihoods=logps))
    assert broken.shortfalls() == ["held-out reward accuracy must be at least 0.9, but is 0.000"]


def test_each_next_step_is_one_shell_command(tmp_path: Path) -> None:
    places = Places(tmp_path / "it's $HOME", tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path)
    text = next_steps(_report(9, 8), places)
    for path in (places.tensorboard, places.checkpoint, places.export, places.data):
        assert f" {path}\n" in text
    ask = next(line for line in text.splitlines() if "text-generation" in line)
    script = f"set -- {ask.strip()}; printf '%s\\n' \"$@\""
    shell = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    python, option, code = shell.stdout.splitlines()
    assert (python, option) == (sys.executable, "-c")
    assert repr(str(places.export)) in code
    compile(code, "ask", "exec")
    assert "make demo-orpo" in text and "CONF_FILE=hf_llama3_8B_DPO_config examples/train.sh" in text


def _write_identity(folder: Path, objective: dict[str, object]) -> None:
    (folder / "run_identity.json").write_text(json.dumps({"of": {"objective": objective}}))


def test_beta_is_that_of_the_run(tmp_path: Path) -> None:
    _write_identity(tmp_path, {"dpo": {"kl_beta": 0.3}, "orpo": None})
    assert read_beta(tmp_path, "dpo") == 0.3
    with pytest.raises(UserError, match=r"does not give orpo.beta of the run .*or give --beta"):
        read_beta(tmp_path, "orpo")
    with pytest.raises(UserError, match="name the run's folder with --tensorboard"):
        read_beta(tmp_path / "missing", "dpo")


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_random_model_is_reported_and_falls_short(
    tiny_demo: Path, tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after are one model: every DPO pair is a tie, and no completion got better."""
    _write_identity(tmp_path, {"dpo": {"kl_beta": 0.3}, "orpo": {"beta": 0.1}})
    model = str(tiny_demo / "model")
    arguments = ["--before", model, "--after", model, "--data", str(tiny_demo / "data")]
    arguments += ["--objective", objective, "--tensorboard", str(tmp_path), "--checkpoint", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "figures.json")]) == 1
    output = capsys.readouterr()
    assert "On 20 held-out pairs" in output.out and "Next steps" in output.out
    assert "error: held-out reward accuracy must be at least 0.9, but is 0." in output.err
    assert "error: the share of right completions must rise" in output.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["pairs"] == 20 and figures["objective"] == objective
    assert figures["beta"] == (0.3 if objective == "dpo" else 0.1)
    assert figures["reward_accuracy"][0] == figures["reward_accuracy"][1]
    if objective == "dpo":
        assert figures["reward_accuracy"] == [0.5, 0.5] and figures["reward_margin"] == [0, 0]
