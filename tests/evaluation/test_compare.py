"""Two models side by side: rewards are those of the loss, figures are derived by hand, scorers that fail are
told with their record, and the page needs nothing else."""

from __future__ import annotations

import json
import math
import re
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import WIDTHS, assert_drawn, needs_browser
from html_page import Page
from safetensors.torch import load_file, save_file
from small_tokenizers import CHATML, make_tokenizer
from training_fixture import Project

import nxdt_align as na
from nxdt_align.cli import main
from nxdt_align.data.records import Record
from nxdt_align.errors import UserError
from nxdt_align.evaluation.compare import Answer, Compared, Comparison, Share, render, share
from nxdt_align.evaluation.scorers import choose_scorer, exact, final_number, gsm8k, scored
from nxdt_align.run.comparison import _answers_to_match, _kind


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of two steps and one of twelve."""
    project = Project.create(tmp_path_factory.mktemp("compare"))
    given = ("data.val_dir=null", "model.optim.sched=null", "model.optim.lr=1e-2", "exp_manager.report=False")
    for name, steps in (("before", 1), ("after", 12)):
        folder = f"exp_manager.explicit_log_dir={project.root / name}"
        assert project.train(f"trainer.max_steps={steps}", folder, *given) == 0
    return project


def exports(project: Project) -> tuple[Path, Path]:
    return project.root / "before" / "hf_export", project.root / "after" / "hf_export"


def compare(project: Project, data: Any = "train.jsonl", **settings: Any) -> dict[str, Any]:
    paths = (*exports(project), project.root / data)
    return na.compare(*paths, **{"max_tokens": 4, "device": "cpu", **settings})


def test_rewards_are_those_of_the_loss(project: Project) -> None:
    """``DPOLoss`` on ``load_policy``'s log-probabilities, at the run's own beta, and its accuracy; the
    answers are those of ``generate``."""
    found = compare(project, limit=8)
    config = na.load_config(project.root / "conf" / "run.yaml")
    dpo = config.model_alignment_strategy.dpo
    assert dpo is not None and found["beta"] == dpo.kl_beta
    pairs = na.load_pairs(project.root / "train.jsonl", project.root / "tokenizer", seq_length=128)
    after, before = (na.load_policy(folder).logps(pairs) for folder in exports(project)[::-1])
    output = na.DPOLoss(dpo)(after, before)
    assert output.chosen_rewards is not None and output.rejected_rewards is not None
    for index, record in enumerate(found["records"]):
        wanted = [float(output.chosen_rewards[index]), float(output.rejected_rewards[index])]
        assert record["rewards"] == pytest.approx(wanted, abs=1e-5)
        assert record["margin"] == pytest.approx(wanted[0] - wanted[1], abs=1e-5)
        assert record["accurate"] == (record["margin"] > 0)
    accurate = sum(record["accurate"] for record in found["records"]) / 8
    assert found["summary"]["accuracy"]["value"] == pytest.approx(accurate)
    told = na.generate(exports(project)[1], project.root / "train.jsonl", max_tokens=4, device="cpu", limit=8)
    assert [each["after"]["text"] for each in found["records"]] == [row["completion"] for row in told]
    changed = [each["before"]["text"] != each["after"]["text"] for each in found["records"]]
    assert found["summary"]["changed"] == sum(changed) / 8 and any(changed)
    assert found["scorer"] == "exact"


def test_a_run_and_itself(project: Project) -> None:
    """A run's newest checkpoint against its export, at another beta."""
    run = project.root / "after"
    found = na.compare(
        run, run / "hf_export", project.root / "val.jsonl", max_tokens=2, device="cpu", beta=0.5
    )
    assert found["beta"] == 0.5 and found["summary"]["changed"] == 0 and found["summary"]["margin"] == 0
    assert found["summary"]["accuracy"]["value"] == found["summary"]["win_rate"]["value"] == 0.5
    assert found["summary"]["win_rate"]["low"] == 0.5


@pytest.mark.full
def test_the_command(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page without scripts or addresses, the same as JSON, and ``--json`` which writes nothing."""
    out = tmp_path / "both.html"
    paths = ["compare", *map(str, exports(project))]
    command = [*paths, "--data", str(project.root / "val.jsonl"), "--max-tokens", "3", "--device", "cpu"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"comparison: {out}" in printed and "answers changed; by exact, the win rate is" in printed
    text = out.read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags) and page.tags.count("svg") == 2
    assert not re.search(r"url\((?!#)|@import", text) and "default-src 'none'" in text
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    written = json.loads(out.with_suffix(".json").read_text())
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["both.html", "both.json"]
    assert main([*command, "--out", str(tmp_path / "x.txt")]) == 1
    assert "out: must end in .html" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    """Said before anything is read."""
    (tmp_path / "file").write_text("")
    for out, said in (("file/x.html", "where .*file is a file"), ("folder.html", "which is a folder")):
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"^out: .* cannot be written, {said}; "):
            na.compare("no", "models", "no.jsonl", out=tmp_path / out)


@needs_browser
def test_in_a_browser(project: Project, tmp_path: Path) -> None:
    compare(project, limit=4, out=tmp_path / "page.html")
    for width in WIDTHS:
        assert_drawn(tmp_path / "page.html", tmp_path, width, plots=2)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.full
def test_single_responses_and_prompts(project: Project, tmp_path: Path) -> None:
    """Of gsm8k's own columns the answer has a reward and a score; prompts alone have neither, and a scorer
    that needs an answer says so."""
    rows = [{"question": f"{i} is one", "answer": f"it is #### {i}"} for i in range(3)]
    found = compare(project, write(tmp_path / "gsm8k.jsonl", rows))
    assert found["scorer"] == "gsm8k" and found["summary"]["accuracy"] is None
    assert all(len(each["rewards"]) == 1 for each in found["records"])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "it was"}, {"prompt": "he is"}])
    found = compare(project, prompts)
    assert found["scorer"] == "none" and found["summary"]["rewards"] == []
    assert [each["rewards"] for each in found["records"]] == [[], []]
    with pytest.raises(
        UserError, match="score: exact compares with the data's answers, but 2 of 2 records have"
    ):
        compare(project, prompts, score="exact")


def test_a_model_whose_values_are_not_finite(project: Project, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exports(project)[1], broken)
    (file,) = broken.glob("*.safetensors")
    weights = load_file(file)
    name = "model.norm.weight"
    save_file({**weights, name: weights[name] * math.nan}, file, {"format": "pt"})
    given: dict[str, Any] = {"max_tokens": 1, "device": "cpu", "limit": 2}
    with pytest.raises(UserError, match=r"broken: .* not finite on 2 of 2 records, first .*train.jsonl:1;"):
        na.compare(exports(project)[0], broken, project.root / "train.jsonl", **given)


def test_a_scorer_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scorers.py").write_text(
        "def words(completion, record): return len(completion.split()) + 10 * len(record['answer'])\n"
        "def broken(completion, record): return 1 / 0\n"
        "def texts(completion, record): return 'good'\n"
        "def alone(completion): return 1\n"
    )
    monkeypatch.chdir(tmp_path)

    def judge(name: str) -> float:
        chosen, score = choose_scorer(name, ["four"])
        assert score is not None and chosen == name
        told = {"prompt": "p", "answer": "four", "rejected": None, "source": "f:1"}
        return scored(chosen, score, "two words", told, "after")

    assert judge("own_scorers.words") == 42
    for name, message in (
        (
            "broken",
            r"own_scorers.broken raises ZeroDivisionError: .* on record f:1 and the completion of after",
        ),
        ("texts", r"own_scorers.texts must return a finite number, but returned str 'good' on record f:1"),
        ("alone", r"score: own_scorers.alone: it must be called as \(completion, record\)"),
        ("absent", "score: own_scorers.absent: own_scorers has no absent"),
    ):
        with pytest.raises(UserError, match=message):
            judge(f"own_scorers.{name}")
    with pytest.raises(UserError, match=r"of Python's standard library"):
        judge("os.path.join")
    with pytest.raises(UserError, match="score: must be auto, none, exact, gsm8k or the dotted path"):
        judge("bleu")


def test_numbers_of_numpy_and_torch_are_scores() -> None:
    def judged(value: object) -> float:
        return scored("x.y", lambda c, r: value, "", {"source": "f:1"}, "after")

    for value in (np.int64(1), np.float32(0.5), np.bool_(True), torch.tensor(2), Decimal("0.25"), True):
        assert judged(value) == float(value)  # type: ignore[arg-type]
    for value in (
        np.str_("1"),
        "1",
        b"1",
        np.ones(2),
        np.nan,
        np.complex64(1),
        1j,
        None,
        10**400,
        torch.ones(2),
    ):
        with pytest.raises(UserError, match=r"x\.y must return a finite number, but returned"):
            judged(value)


def test_a_scorer_is_tried_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tried_scorers.py").write_text("def texts(completion, record): return completion\n")
    monkeypatch.chdir(tmp_path)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}])
    with pytest.raises(
        UserError, match=r"returned str 'good' on record .*pairs.jsonl:1 and the completion of the data"
    ):
        na.compare("no_model", "no_model", pairs, score="tried_scorers.texts", device="cpu")


def test_built_in_scorers() -> None:
    for text, number in (
        ("#### 1,234", 1234),
        ("so 3 and then $4.50.", 4.5),
        ("5 #### -2 and 7", -2),
        ("no", None),
    ):
        found = final_number(text)
        assert (None if found is None else float(found)) == number
    assert gsm8k("It is 42.", {"answer": "6*7 #### 42"}) == 1 and gsm8k("none", {"answer": "#### 42"}) == 0
    assert exact(" Blue\n is it.", {"answer": "blue is it"}) == 1 and exact("Blue!", {"answer": "blue"}) == 0
    assert choose_scorer("auto", ["#### 1", "2"])[0] == "exact"
    with pytest.raises(UserError, match="returned float nan"):
        scored("x.y", lambda c, r: float("nan"), "", {"source": "f:1"}, "before")


def test_the_interval() -> None:
    """Of 100 values, 60 of them 1: the mean's standard error is 0.049, so the interval is 0.6 -+ 0.096, to
    the 0.01 that the means come in."""
    found = share([1.0] * 60 + [0.0] * 40)
    assert found is not None and found.value == 0.6 and found.records == 100
    assert found.low == pytest.approx(0.504, abs=0.011) and found.high == pytest.approx(0.696, abs=0.011)
    assert share([]) is None and share([0.5]) == Share(0.5, 0.5, 0.5, 1)


def test_labelled_completions(project: Project, tmp_path: Path) -> None:
    """An undesirable completion is no answer to score by; its reward is that of the same completion that is
    desirable."""
    completions = (("a", True), ("a", False))
    rows = [{"prompt": "it was", "completion": text, "label": good} for text, good in completions]
    file = write(tmp_path / "kto.jsonl", rows)
    found = compare(project, file, max_tokens=1, format="unpaired")
    rewards = [each["rewards"] for each in found["records"]]
    assert rewards[0] == rewards[1] != [0.0] and found["scorer"] == "exact"
    assert [each["label"] for each in found["records"]] == [True, False]
    assert [each["after"]["score"] is None for each in found["records"]] == [False, True]
    assert found["summary"]["rewards"] == [rewards[0][0], rewards[1][0]]
    assert found["summary"]["win_rate"]["records"] == 1 and found["summary"]["accuracy"] is None
    assert _answers_to_match([Record("p", ("a",), False)] * 2) == [None, None]
    for verb in (compare, lambda _, data, **given: na.generate(exports(project)[0], data, **given)):
        with pytest.raises(UserError, match=r"^--format: 'nonesuch' is no format"):
            verb(project, file, format="nonesuch")


def test_the_kind_that_a_file_is_read_as(tmp_path: Path) -> None:
    """A label that is no truth value is another column; a named format is that of the first kind whose
    records it makes."""
    labelled = {"prompt": "p", "completion": "c", "label": 0}
    alpaca = {"instruction": "i", "output": "o"}
    for row, format, kind in (
        (labelled, None, "unpaired"),
        (labelled, "prompt_completion", "response"),
        (labelled | {"label": "easy"}, None, "response"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": 1}, None, "pair"),
        (alpaca, "alpaca", "response"),
        (alpaca | {"kto_tag": False}, "alpaca", "unpaired"),
        ({"messages": [{"role": "user", "content": "u"}]}, "messages", "prompt"),
    ):
        assert _kind(str(write(tmp_path / "rows.jsonl", [row])), format) == kind


def test_gains_of_undesirable_completions() -> None:
    """By 0.1 * 2 nats less likely is a gain of 0.2."""
    answers = [Answer("t", 1, "stop", (logp,), None) for logp in (0.0, -2.0)]
    pair = [Compared(f"f:{label}", "p", ("c",), *answers, 0.1, label) for label in (True, False)]
    found = Comparison("b", "a", "f", 0.1, "none", tuple(pair))
    assert [each.source for each in found.gains] == ["f:False"] and found.gains[0].gain[1] == 0.2
    assert [each.source for each in found.losses] == ["f:True"]
    assert "-0.200 (desirable), -0.200 (undesirable)" in render(found)


def of(index: int, score: tuple[float, float], logps: tuple[float, float]) -> Compared:
    texts = ("same", "same") if score[0] == score[1] else ("one", "<b>other</b>")
    before, after = (
        Answer(text, 3, "stop", each, of_record)
        for text, each, of_record in zip(texts, ((0.0, 0.0), logps), score, strict=True)
    )
    return Compared(f"f:{index}", "a <i>prompt</i>", ("c", "r"), before, after, 0.1)


def test_figures_by_hand() -> None:
    """Scores 0->1, 1->0, 1->1, 1->1 and margins +2, +2, -1, 0 nats: win rate (1 + 0 + 0.5 + 0.5) / 4,
    accuracy (1 + 1 + 0 + 0.5) / 4, mean margin 0.1 * 3 / 4, half of the answers changed."""
    records = (
        of(0, (0.0, 1.0), (2.0, 0.0)),
        of(1, (1.0, 0.0), (2.0, 0.0)),
        of(2, (1.0, 1.0), (0.0, 1.0)),
        of(3, (1.0, 1.0), (0.0, 0.0)),
    )
    found = Comparison("b", "a", "f", 0.1, "exact", records)
    summary = found.summary
    assert summary["win_rate"].value == 0.5 and summary["accuracy"].value == 0.625
    assert summary["margin"] == pytest.approx(0.075) and summary["changed"] == 0.5
    assert summary["score"] == {"before": 0.75, "after": 0.75}
    assert [each.source for each in found.gains] == ["f:0"]
    assert [each.source for each in found.losses] == ["f:1", "f:2"]
    page = render(found)
    assert "<b>other" not in page and "&lt;b&gt;other" in page and "a &lt;i&gt;prompt" in page


def test_the_runs_own_template_variables(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run's ``data.chat_template_kwargs`` are read from its folder, of a checkpoint in it, too; what is
    given takes precedence, and a damaged file is told."""
    from nxdt_align.run.generation import variables_of_run

    run = project.root / "after"
    file = run / "config.yaml"
    text = file.read_text()
    assert variables_of_run(run) is None
    file.write_text(re.sub(r"chat_template_kwargs: .*", "chat_template_kwargs: {brief: true}", text))
    try:
        (checkpoint,) = (run / "checkpoints").iterdir()
        for place in (run, checkpoint, run / "hf_export"):
            assert variables_of_run(place) == {"brief": True}
        make_tokenizer(template=CHATML).save_pretrained(tmp_path / "chatml")
        settings: Any = {"max_tokens": 1, "device": "cpu", "tokenizer": tmp_path / "chatml"}
        val, export = project.root / "val.jsonl", exports(project)[1]
        with pytest.raises(UserError, match="does not read `brief`"):
            na.generate(export, val, **settings)
        assert "with the run's data.chat_template_kwargs" in caplog.text
        assert na.generate(export, val, chat_template_kwargs={}, **settings)
        file.write_text("a: [")
        with pytest.raises(UserError, match=r"config.yaml cannot be read: .*; restore it"):
            na.generate(export, val, **settings)
    finally:
        file.write_text(text)
