"""The page of one run and of several: self-contained, safe, joined over resumed runs, whatever files hold."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from browser import WIDTHS, assert_drawn, needs_browser
from html_page import Page
from torch.utils.tensorboard import SummaryWriter
from training_fixture import Project

from nxdt_align.cli import main
from nxdt_align.evaluation.curves import read_curves
from nxdt_align.evaluation.report import read_run, render
from nxdt_align.evaluation.settings import differing, flat

LOSS = "reduced_train_loss"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of DPO in two parts."""
    project = Project.create(tmp_path_factory.mktemp("report"))
    report = "exp_manager.report=True"
    assert project.train("trainer.max_steps=4") == 0
    assert project.train("trainer.max_steps=8", report) == 0
    return project


def read(file: Path) -> Page:
    return Page(file.read_text())


def test_a_run_ends_with_its_report(project: Project) -> None:
    run = project.only_run()
    page = read(run / "report.html")
    assert page.tags.count("svg") == 10
    for said in ("Reward margin", "rewards", "dpo, 8 steps", "data.train_dir", "22 train examples"):
        assert said.lower() in page.text.lower()
    found = json.loads((run / "report.json").read_text())["runs"][0]
    assert found["verdict"]["summary"] in page.text and found["steps"] == 8
    assert set(found["metrics"]["reduced_train_loss"]) == {"first", "last", "step"}
    assert "the run's folder" not in page.text


def test_the_page_needs_nothing_else(project: Project) -> None:
    """No script, no address that is loaded, ids that occur once, and a policy that forbids any request."""
    text = (project.only_run() / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "use-remote"} & set(page.tags)
    loaded = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "data", "action")]
    assert all(value is not None and value.startswith("#") for value in loaded)
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) and {v[1:] for v in loaded if v} <= set(ids)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert len(text) < 600_000


def test_a_resumed_run_is_one_curve(project: Project) -> None:
    """Both files of events, and metrics.jsonl, agree; steps lost after the checkpoint are dropped."""
    run = project.only_run()
    whole = read_curves(run)
    assert whole[LOSS].steps == tuple(range(1, 9)) and whole.notes == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"resumed_after": 4} in lines and "memory/host_gib" in lines[0]
    assert len(list(run.glob("events.*"))) == 2


def copied(project: Project, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(project.only_run(), run, ignore=shutil.ignore_patterns("checkpoints", "hf_export"))
    return run


def change(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert text.count(old) == 1
    (run / "config.yaml").write_text(text.replace(old, new))


def test_events_alone_give_the_same_curves(project: Project, tmp_path: Path) -> None:
    """As of a run of an earlier version; float32 against float64."""
    run = copied(project, tmp_path)
    with_both = read_curves(run)
    (run / "metrics.jsonl").unlink()
    events = read_curves(run)
    for name, curve in events.by_name.items():
        assert with_both[name].steps == curve.steps
        assert with_both[name].values == pytest.approx(curve.values, rel=1e-6, abs=1e-12)
    for file in run.glob("events.*"):
        file.unlink()
    assert read_curves(run).last_step == 0


def test_lost_steps_do_not_count(tmp_path: Path) -> None:
    """Stopped at step 5, resumed after step 3 and stopped at 4: step 5 is not of this run. So with events,
    whose second file says purge_step, and with lines."""
    run = tmp_path / "run"
    for begin, values in ((1, (1.0, 2.0, 3.0, 4.0, 5.0)), (4, (4.5,))):
        writer = SummaryWriter(str(run), purge_step=begin if begin > 1 else None)  # type: ignore[no-untyped-call]
        for at, value in enumerate(values):
            writer.add_scalar(LOSS, value, begin + at)  # type: ignore[no-untyped-call]
        writer.close()  # type: ignore[no-untyped-call]
    assert read_curves(run)[LOSS].values == (1.0, 2.0, 3.0, 4.5)
    for file in run.iterdir():
        file.unlink()
    rows: list[dict[str, Any]] = [{"step": step, LOSS: float(step)} for step in range(1, 6)]
    rows += [{"resumed_after": 3}, {"step": 4, LOSS: 4.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_curves(run)[LOSS].values == (1.0, 2.0, 3.0, 4.5)


def test_cut_and_damaged_files_are_read_as_far_as_they_go(project: Project, tmp_path: Path) -> None:
    run = copied(project, tmp_path)
    lines = run / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes()[:-40])
    curves = read_curves(run)
    assert curves[LOSS].steps == tuple(range(1, 9))  # from the events
    assert curves.notes == ["metrics.jsonl: the last line is damaged and left out"]
    lines.unlink()
    _, second = sorted(run.glob("events.*"), key=lambda file: file.stat().st_mtime)
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    (run / "events.out.tfevents.0.empty").write_bytes(b"")
    (run / "events.out.tfevents.1.noise").write_bytes(struct.pack("<QI", 2**40, 7) + b"noise" * 9)
    curves = read_curves(run)
    assert 4 <= curves.last_step < 8
    page = Page(render([read_run(run, "run")]))
    assert any("damaged" in note for note in curves.notes) and "damaged" in page.text


def test_lines_that_are_no_metrics(tmp_path: Path) -> None:
    """Numbers that are too large, too: of a step, of a value, of the step that a run was resumed after."""
    digits = "9" * 400
    lines = ['{"step": 1, "a": 2, "b": null}', "[1]", '{"a": 3}', '{"step": "x"}', "null"]
    lines += ['{"step": 1e999}', '{"resumed_after": 1e999}', f'{{"step": {digits}, "a": 3}}']
    lines += [f'{{"step": 2, "a": {digits}}}', f'{{"resumed_after": -{digits}}}']
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    curves = read_curves(tmp_path)
    assert curves["a"].values == (2.0,) and not curves["b"]
    assert curves.notes[0] == "metrics.jsonl: line 2 is damaged and left out"
    assert "9 lines are damaged" in curves.notes[1] and "b: 1 of 1 values are not finite" in curves.notes[2]
    assert main(["report", str(tmp_path)]) == 0


def test_a_run_that_has_not_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert main(["report", str(tmp_path)]) == 0
    assert "Nothing has been logged yet." in capsys.readouterr().out
    assert "Nothing has been logged yet." in read(tmp_path / "report.html").text


def test_several_runs(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copied(project, tmp_path)
    change(other, "kl_beta: 0.3", "kl_beta: 0.5")
    runs = [str(project.only_run()), str(other)]
    out = tmp_path / "both.html"
    assert main(["report", *runs, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"report: {out}" and len(said) == 3
    page = read(out)
    assert page.text.count("kl_beta") >= 3 and "0.5" in page.text  # differing, and both runs' own
    assert page.tags.count("svg") == 10
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["settings_that_differ"] == {"model_alignment_strategy.dpo.kl_beta": [0.3, 0.5]}


def test_runs_of_different_objectives(project: Project, tmp_path: Path) -> None:
    """Losses and rewards of DPO and ORPO have other scales: they are not drawn over each other."""
    out = tmp_path / "page.html"
    other = copied(project, tmp_path)
    change(other, "  dpo:\n", "  dpo: null\n  orpo:\n")
    change(other, "  orpo: null\n", "")
    runs = [str(project.only_run()), str(other)]
    assert main(["report", *runs, "--out", str(out)]) == 0
    page = read(out)
    assert "The objectives differ (dpo, orpo)" in page.text
    assert page.tags.count("svg") == 4


def test_json_writes_nothing(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(project, tmp_path)
    (run / "report.html").unlink()
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["objective"] == "dpo"
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "missing does not exist"),
        ("tokenizer", "is no folder of a run: it has neither metrics.jsonl nor"),
        ("experiments/run", "is a folder of runs"),
        ("train.jsonl", "is no folder of a run"),
    ],
)
def test_what_is_no_run(
    project: Project, path: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(project.root / path)]) == 1
    assert message in capsys.readouterr().err


def test_out_must_be_a_page(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (project.root / "folder.html").mkdir()
    (project.root / "page.json").mkdir()
    run = project.only_run()
    file = run / "metrics.jsonl"
    for out, said in (
        ("page.json", "must end in .html"),
        (str(file / "x.html"), f"x.html cannot be written, where {file} is a file; "),
        (str(project.root / "folder.html"), "folder.html cannot be written, which is a folder; "),
        (str(project.root / "page.html"), "page.json cannot be written, which is a folder; "),
    ):
        assert main(["report", str(run), "--out", out]) == 1
        assert said in capsys.readouterr().err


def test_whatever_a_run_is_called_is_text(project: Project, tmp_path: Path) -> None:
    """Names and settings come from outside: markup in them is shown, not read; $ is no mathematics."""
    evil = "<script>alert(1)</script> $x_"
    run = copied(project, tmp_path)
    change(run, "kl_beta: 0.3", "kl_beta: '<img src=x onerror=y>'")
    text = render([read_run(run, evil), read_run(run, "_other")])
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert evil in page.text and "<img src=x onerror=y>" in page.text


def test_settings_that_differ() -> None:
    first, second = flat({"a": {"b": 1, "c": []}, "d": None}), flat({"a": {"b": 2, "c": []}, "e": {}})
    assert first == {"a.b": 1, "a.c": [], "d": None}
    assert differing([first, second]) == {"a.b": [1, 2], "e": [None, {}]}


def test_a_report_that_cannot_be_written_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nxdt_align.evaluation.report.write_reports", full)
    project = Project.create(tmp_path, pairs=4)
    assert project.train("trainer.max_steps=1", "data.val_dir=null", "exp_manager.report=True") == 0
    assert "cannot be written: the disk is full" in capfd.readouterr().err


def test_metrics_that_cannot_be_written_fail_no_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    project = Project.create(tmp_path, pairs=4)
    run = tmp_path / "fixed"
    (run / "metrics.jsonl").mkdir(parents=True)
    settings = ("trainer.max_steps=2", "data.val_dir=null", f"exp_manager.explicit_log_dir={run}")
    assert project.train(*settings) == 0
    assert capfd.readouterr().err.count("metrics.jsonl cannot be written") == 1


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser(project: Project, width: int, tmp_path: Path) -> None:
    assert_drawn(project.only_run() / "report.html", tmp_path, width, plots=10)


@needs_browser
@pytest.mark.full
@pytest.mark.parametrize("width", WIDTHS)
def test_several_runs_in_a_browser(project: Project, width: int, tmp_path: Path) -> None:
    run, copy = project.only_run(), tmp_path / "a_copy_with_a_name_that_is_longer_than_a_window_is_wide"
    shutil.copytree(run, copy)
    page = tmp_path / "both.html"
    assert main(["report", str(run), str(copy), "--out", str(page)]) == 0
    assert_drawn(page, tmp_path, width, plots=10)
