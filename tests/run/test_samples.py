"""Samples during evaluation: what the policy answers is what transformers' greedy search gives of the export,
and the run is the same without them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_fixture import TIMES, Project, scalars

import nxdt_align as na
from nxdt_align.cli import main
from nxdt_align.config.check import find_faults
from nxdt_align.config.experiment import SampleConfig
from nxdt_align.evaluation.report import read_run, read_samples, render
from nxdt_align.run.samples import sample_callbacks
from nxdt_align.training.samples import SampleDuringEval, SamplePrompt

GIVEN = (
    "trainer.max_steps=6",
    "trainer.val_check_interval=2",
    "model.optim.sched=null",
    "model.optim.lr=1e-2",
)
SAMPLES = ("exp_manager.sample_during_eval.prompts=3", "exp_manager.sample_during_eval.max_tokens=5")
KEY = "exp_manager.sample_during_eval"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run with samples and one without."""
    project = Project.create(tmp_path_factory.mktemp("samples"))
    report = ("exp_manager.report=True", f"{KEY}.every_n_validations=3")
    for name, more in (("with", (*SAMPLES, *report)), ("without", ())):
        folder = f"exp_manager.explicit_log_dir={project.root / name}"
        assert project.train(folder, *GIVEN, *more) == 0
    return project


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_answers_are_those_of_the_export(project: Project) -> None:
    """Of the prompts of the validation data, before the first step and after validation 3, step 6."""
    rows = lines(project.root / "with")
    assert [(row["step"], row["validation"], row["index"]) for row in rows] == [
        *((0, 0, index) for index in range(3)),
        *((6, 3, index) for index in range(3)),
    ]
    data = [json.loads(line) for line in (project.root / "val.jsonl").read_text().splitlines()]
    export = project.root / "with" / "hf_export"
    told = na.generate(export, project.root / "val.jsonl", max_tokens=5, limit=3, device="cpu")
    for before, after, record, row in zip(rows[:3], rows[3:], data, told, strict=False):
        assert after["prompt"] == record["prompt"] and after["answer"].strip() == record["chosen"]
        assert after["completion"] == row["completion"] and after["tokens"] == row["completion_tokens"]
        assert after["finish_reason"] == row["finish_reason"]
        assert before["before"] is None and after["before"] == before["completion"]
        assert before["reference"] == after["reference"] == before["completion"], "the policy's start is it"
    assert [row["completion"] for row in rows[:3]] != [row["completion"] for row in rows[3:]]


def same(one: Path, other: Path) -> None:
    """Every weight and every logged value, bit for bit."""
    first, second = (load_file(run / "hf_export" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    curves, others = scalars(one), scalars(other)
    assert curves.keys() == others.keys()
    assert all(curves[name] == others[name] for name in curves if name not in TIMES)


def test_the_run_is_the_same_without_them(project: Project) -> None:
    same(project.root / "with", project.root / "without")
    assert not (project.root / "without" / "samples.jsonl").exists()


@pytest.mark.full
def test_drawn_answers_differ_and_change_nothing(project: Project) -> None:
    folder = f"exp_manager.explicit_log_dir={project.root / 'drawn'}"
    assert project.train(folder, *GIVEN, *SAMPLES, f"{KEY}.temperature=1.5") == 0
    same(project.root / "drawn", project.root / "without")
    rows = lines(project.root / "drawn")
    assert [row["step"] for row in rows[::3]] == [0, 2, 4, 6]
    assert len({tuple(row["completion"] for row in rows[at : at + 3]) for at in range(0, 12, 3)}) > 1


def test_they_are_shown(project: Project) -> None:
    """In the report, and as text in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = project.root / "with"
    (found,) = json.loads((run / "report.json").read_text())["runs"]
    assert [s["completion"] for s in found["samples"]] == [r["completion"] for r in lines(run)[3:]]
    page = (run / "report.html").read_text()
    assert "at step 6" in page and "before training (the reference)" in page
    known = read_run(run, "run")
    other = replace(known, samples=tuple({**sample, "reference": "of another"} for sample in known.samples))
    assert '<p class="soft">the reference</p><pre>of another</pre>' in render([other])
    events = EventAccumulator(str(run)).Reload()
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 6]
    text = texts[1].tensor_proto.string_val[0].decode()
    assert text.startswith("| prompt | before training (the reference) | now | the data's answer |\n| --- |")
    assert lines(run)[3]["prompt"] in text


def resumed(project: Project, steps: int) -> list[dict[str, Any]]:
    folder = f"exp_manager.explicit_log_dir={project.root / 'with'}"
    more = (*GIVEN[1:], *SAMPLES, f"{KEY}.every_n_validations=3")
    assert project.train(folder, f"trainer.max_steps={steps}", *more) == 0
    return lines(project.root / "with")


def test_a_resumed_run_mends_the_file(project: Project) -> None:
    """A line of a step behind the checkpoint, and one that a kill has cut, are taken out."""
    run = project.root / "with"
    kept = (run / "samples.jsonl").read_text()
    abandoned = {**lines(run)[-1], "step": 8, "validation": 4}
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(abandoned) + '\n{"step": 6, "val')
    resumed(project, 10)
    assert (run / "samples.jsonl").read_text() == kept


def test_a_resumed_run_remembers(project: Project) -> None:
    """The first answers, from the file, and the count of validations, also between two samplings: after 5,
    from the test before."""
    rows = resumed(project, 12)
    assert [(row["step"], row["validation"]) for row in rows[6:]] == [(12, 6)] * 3
    first = [row["completion"] for row in rows[:3]]
    assert [row["before"] for row in rows[6:]] == [row["reference"] for row in rows[6:]] == first
    samples = read_samples(project.root / "with" / "samples.jsonl")
    assert {sample["step"] for sample in samples} == {12}


def test_each_validation_counts_once_over_a_resume(tmp_path: Path) -> None:
    """One that a checkpoint comes before, whether the restart runs it again or not, and one that it comes
    after; a checkpoint of an earlier version has no count, so that the file's serves."""
    none: Any = None

    def callback() -> SampleDuringEval:
        engine: Any = SimpleNamespace(
            greedy=lambda prompts, **settings: [[7, 2] for _ in prompts], broadcast_object=lambda own: own
        )
        every = SampleConfig(every_n_validations=3)
        prompts = [SamplePrompt((5,), "", "")]
        return SampleDuringEval(
            engine, prompts, every, length=8, at_once=2, ends={2}, decode=str, folder=tmp_path, seed=0
        )

    def at(step: int, follows: bool = False) -> Any:
        writer = SimpleNamespace(validation_follows=lambda trainer: follows)
        said = {"is_global_zero": True, "sanity_checking": False, "loggers": []}
        return SimpleNamespace(global_step=step, checkpoint_callback=writer, **said)

    def counted(saved: dict[str, Any], *steps: int) -> int:
        made = callback()
        made.on_load_checkpoint(none, none, saved)
        made.on_train_start(at(4), none)
        for step in steps:
            made.on_validation_end(at(step), none)
        return made._validations

    first = callback()
    first.on_train_start(at(0), none)
    first.on_validation_end(at(2), none)
    before: dict[str, Any] = {}
    first.on_save_checkpoint(at(4, follows=True), none, before)
    assert counted(before, 6) == counted(before, 4, 6) == 3
    assert [row["step"] for row in lines(tmp_path)] == [0, 6]  # the second's line in the place of the first's
    first.on_validation_end(at(4), none)
    after: dict[str, Any] = {}
    first.on_save_checkpoint(at(4), none, after)
    assert before == after and counted(after, 6) == 3 and counted({}, 6) == 1
    alone = SimpleNamespace(global_step=4, checkpoint_callback=None)
    first.on_save_checkpoint(alone, none, after)  # type: ignore[arg-type]
    assert before == after


def test_faults_and_notices(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults(*overrides: str) -> list[str]:
        config = na.load_config(project.root / "conf" / "run.yaml", *SAMPLES, *overrides)
        return [str(fault) for fault in find_faults(config)]

    parallel = ("trainer.devices=2", "distributed_strategy.tensor_model_parallel_size=2")
    assert faults(f"{KEY}.temperature=0.5") == [] and faults(*parallel) == []
    (fault,) = faults(f"{KEY}.temperature=0.5", *parallel)
    assert "temperature: must be 0 with distributed_strategy.tensor_model_parallel_size above 1" in fault
    (fault,) = faults(f"{KEY}.prompts=-1")
    assert f"{KEY}.prompts" in fault
    arguments = project.arguments(f"exp_manager.explicit_log_dir={project.root / 'x'}", *SAMPLES)
    of_nemo = BufferingHandler(1000)
    monkeypatch.setattr(logging.getLogger("nemo_logger"), "handlers", [of_nemo])
    assert main([*arguments, f"{KEY}.max_tokens=256"]) == 1
    assert f"{KEY}.max_tokens: must be below the model's 256 positions" in capsys.readouterr().err
    assert main(["config", *arguments[1:], "data.val_dir=null"]) == 0
    assert main([*arguments, "data.val_dir=null", "trainer.max_steps=1"]) == 0
    assert "no samples, as the run does not validate" in capsys.readouterr().err
    assert [r.getMessage() for r in of_nemo.buffer if "already exists" in r.getMessage()] == []


@pytest.mark.parametrize(
    ("lazy", "told"),
    [(True, "a graph; nxdt-align generate"), (False, "distributed_strategy.compile=none makes")],
)
def test_none_are_made_where_steps_are_compiled(
    project: Project, caplog: pytest.LogCaptureFixture, lazy: bool, told: str
) -> None:
    config: Any = na.load_config(project.root / "conf" / "run.yaml", *SAMPLES)
    engine: Any = SimpleNamespace(lazy=lazy, compiler=object())
    none: Any = None
    caplog.set_level("INFO", logger="nxdt_align")
    given: Any = {"row_multiple": 1, "folder": project.root, "is_new": True, "reference": None}
    assert sample_callbacks(config, engine, none, none, {}, none, **given) == []
    assert told in caplog.text


def test_no_pass_has_more_prompts_than_a_micro_batch_has_tokens_for(tmp_path: Path) -> None:
    """Five prompts, two at a time; what each is answered stands in their order."""
    passes: list[list[tuple[int, ...]]] = []

    def greedy(prompts: list[tuple[int, ...]], **settings: Any) -> list[list[int]]:
        assert settings["length"] == 8
        passes.append(prompts)
        return [[prompt[0], 2] for prompt in prompts]

    engine: Any = SimpleNamespace(greedy=greedy)
    prompts = [SamplePrompt((token,), "", "") for token in range(10, 15)]
    made = SampleDuringEval(
        engine, prompts, SampleConfig(), length=8, at_once=2, ends={2}, decode=str, folder=tmp_path, seed=0
    )
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=False)
    none: Any = None
    made.on_train_start(trainer, none)
    assert passes == [[(10,), (11,)], [(12,), (13,)], [(14,)]]
    assert list(made._before.values()) == ["[10]", "[11]", "[12]", "[13]", "[14]"]


@pytest.mark.parametrize("is_loaded", [True, False])
def test_another_reference_answers_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, is_loaded: bool
) -> None:
    """In a run that goes on from another's checkpoint, whose own first answers are those of its first step,
    and whose validations are counted anew; a later process has both from the file. Stored values need no
    reference, so that its column is empty, with a notice."""
    asked: list[bool] = []
    shown: list[tuple[str, ...]] = []

    def write(loggers: Any, name: str, columns: Any, rows: Any, step: int) -> None:
        shown.extend([tuple(columns), *map(tuple, rows)])

    monkeypatch.setattr("nxdt_align.training.samples.write_table", write)

    def greedy(prompts: Any, *, reference: bool, **settings: Any) -> list[list[int]]:
        asked.append(reference)
        return [[8 if reference else len(asked), 2] for _ in prompts]

    def callback(is_new: bool) -> SampleDuringEval:
        engine: Any = SimpleNamespace(greedy=greedy, broadcast_object=lambda own: own)
        settings: Any = {"length": 8, "at_once": 2, "ends": {2}, "folder": tmp_path, "seed": 0}
        more: Any = {"decode": lambda tokens: str(tokens[0]), "is_new": is_new, "reference": "other"}
        return SampleDuringEval(engine, [SamplePrompt((5,), "", "")], SampleConfig(), **settings, **more)

    def at(step: int) -> Any:
        said = {"is_global_zero": True, "sanity_checking": False, "loggers": []}
        return SimpleNamespace(global_step=step, **said)

    none: Any = None
    made = callback(is_new=True)
    assert made.wants_reference
    made.on_load_checkpoint(none, none, {"sample_during_eval": {"validations": 7, "counted_at": 4}})
    made.ask_reference(is_loaded)
    made.on_train_start(at(4), none)
    made.on_validation_end(at(6), none)
    later = callback(is_new=False)
    assert not later.wants_reference
    later.on_train_start(at(6), none)
    later.on_validation_end(at(8), none)
    assert asked == [True, False, False, False][not is_loaded :]
    reference = "8" if is_loaded else None
    first = str(1 + is_loaded)
    assert [(row["step"], row["validation"], row["before"], row["reference"]) for row in lines(tmp_path)] == [
        *((4, 0, None, reference), (6, 1, first, reference), (8, 2, first, reference)),
    ]
    assert ("its log-probabilities are all stored" in caplog.text) is not is_loaded
    extra = ("the reference", "8") if is_loaded else ()
    assert shown[-2:] == [
        ("prompt", *extra[:1], "before training", "now", "the data's answer"),
        ("", *extra[1:], first, str(3 + is_loaded), ""),
    ]
    assert read_samples(tmp_path / "samples.jsonl")[0]["reference"] == reference


def test_a_text_may_hold_what_parts_lines_elsewhere(tmp_path: Path) -> None:
    """U+2028, U+2029 and U+0085 stay in their line, in the report and when a run resumes; a cut line goes."""
    engine: Any = SimpleNamespace(greedy=lambda prompts, **settings: [[7, 2] for _ in prompts])
    text = "a\u2028b\u2029c\x85d\x1ce"
    made = SampleDuringEval(
        engine,
        [SamplePrompt((5,), text, text)],
        SampleConfig(),
        length=8,
        at_once=2,
        ends={2},
        decode=lambda tokens: text,
        folder=tmp_path,
        seed=0,
    )
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[])
    none: Any = None
    made.on_train_start(trainer, none)
    file = tmp_path / "samples.jsonl"
    (told,) = read_samples(file)
    assert told["prompt"] == told["answer"] == told["completion"] == text
    whole = file.read_text()
    file.write_text(whole + '{"step": 0, "val')
    assert made._resume(2) == (0, {0: text}, {})
    assert file.read_text() == whole
