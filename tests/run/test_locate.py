"""What a path to weights may lead to: weights, a run, its checkpoints, a link or a file that names one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_fixture import CONFIG, fresh, run
from training_fixture import Project

from nxdt_align.cli import main
from nxdt_align.config.load import load_config
from nxdt_align.config.start import VOCABULARIES, tokenizer_of
from nxdt_align.engines.checkpoint_folder import Summary
from nxdt_align.engines.native.checkpoint import SUMMARY, NativeCheckpoint
from nxdt_align.engines.nxd.checkpoint import SUMMARY as NXD_SUMMARY
from nxdt_align.errors import UserError
from nxdt_align.run.conversion import describe
from nxdt_align.run.locate import companions, locate
from nxdt_align.run.resume import write_identity
from nxdt_align.weights import hf_writer
from nxdt_align.weights.hf_writer import write_hf_folder


def save(folder: Path, step: int, summary: Summary = SUMMARY) -> Path:
    """A run's checkpoint by its summary alone."""
    checkpoint = folder / "checkpoints" / f"run--step={step}"
    checkpoint.mkdir(parents=True)
    summary.write(checkpoint, {"step": step, **{key: kind() for key, kind in summary.says.items()}})
    return checkpoint


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of three checkpoints, the last one damaged, and what a kill has left."""
    folder = tmp_path / "experiments" / "run" / "2026-01-01_00-00-00"
    write_identity(folder, "digest", {"model": CONFIG.to_hf_dict()})
    for step in (4, 12, 30):
        save(folder, step)
    (folder / "checkpoints" / "run--step=30" / "checkpoint.json").write_text("{")
    (folder / "checkpoints" / ".run--step=31.0a1b.nxdt-tmp").mkdir()
    return folder


def checkpoints_of(run: Path) -> list[Path]:
    return [f for f in (run / "checkpoints").iterdir() if f.is_dir()]


@pytest.mark.parametrize("summary", [SUMMARY, NXD_SUMMARY], ids=["native", "nxd"])
@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/run--step=40"])
def test_a_run_leads_to_its_newest_whole_checkpoint(finished: Path, summary: Summary, name: str) -> None:
    newest = save(finished, 40, summary)
    assert locate(finished / name) == newest


def test_one_checkpoint_is_taken_as_it_is(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (4, 30):  # a damaged one, too: its reader says what is wrong with it
        assert locate(finished / f"checkpoints/run--step={step}").name == f"run--step={step}"
    monkeypatch.chdir(finished.parent)
    assert locate(Path(finished.name)).name == "run--step=12"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("checkpoints/last_checkpoint", "run--step=4"),
        ("checkpoints/latest", "run--step=4\n"),
        ("last_checkpoint", "run--step=4"),
        ("last_checkpoint.txt", "checkpoints/run--step=4\n\n"),
        ("pointer", "{run}/checkpoints/run--step=4"),
    ],
)
def test_a_file_names_the_checkpoint(finished: Path, place: str, text: str) -> None:
    (finished / place).write_text(text.format(run=finished))
    assert locate(finished / place).resolve() == finished / "checkpoints" / "run--step=4"


def test_links_lead_there_and_to_what_belongs_to_the_run(finished: Path, tmp_path: Path) -> None:
    names = ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    (finished / "for_export" / "additional_chat_templates").mkdir(parents=True)
    for name in names:
        (finished / "for_export" / name).write_text(name)
    (finished / "for_export" / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    for link, target in (("last_checkpoint", "checkpoints/run--step=4"), ("newest_run", "")):
        (tmp_path / link).symlink_to(finished / target)
        found = companions(locate(tmp_path / link))
        assert found.generation == {"eos_token_id": [2, 9]}
        assert set(found.tokenizer) == set(names)
    (tmp_path / "no_more").symlink_to(finished / "checkpoints" / "gone")
    with pytest.raises(UserError, match="no_more does not exist"):
        locate(tmp_path / "no_more")


@pytest.mark.parametrize("name", ["last_checkpoint", "checkpoints/last_checkpoint", "checkpoints/latest"])
def test_a_name_of_the_newest_stands_for_it_where_there_is_no_such_file(finished: Path, name: str) -> None:
    assert locate(finished / name).name == "run--step=12"


def no_checkpoint(run: Path) -> Path:
    for folder in checkpoints_of(run):
        folder.rename(run.parent / f"{folder.name}.gone")
    return run


def test_a_run_without_checkpoints_has_its_export(finished: Path) -> None:
    write_hf_folder(no_checkpoint(finished) / "hf_export", CONFIG, fresh(CONFIG))
    assert locate(finished) == finished / "hf_export"


def only_temporaries(run: Path) -> Path:
    no_checkpoint(run)
    (run / "checkpoints" / ".run--step=31.0a1b.nxdt-tmp").mkdir()
    return run


def only_damaged(run: Path) -> Path:
    for step in (4, 12):
        (run / "checkpoints" / f"run--step={step}").rename(run.parent / f"{step}")
    return run / "checkpoints"


def several_runs(run: Path) -> Path:
    write_identity(run.with_name("2026-02-02_00-00-00"), "other", {})
    return run.parent


FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty run": (no_checkpoint, "has no whole checkpoint: name another run, or start this one again"),
    "temporaries": (only_temporaries, "no whole checkpoint, only what an interrupted save has left: name"),
    "damaged": (only_damaged, "has no whole checkpoint, as run--step=30 is incomplete: name another"),
    "runs": (
        several_runs,
        r"is a folder of runs \(2026-02-02_00-00-00, 2026-01-01_00-00-00\): name one, such as .*2026-02-02_",
    ),
    "experiments": (
        lambda run: several_runs(run).parent,
        r"is a folder of runs \(run/2026-02-02_00-00-00, run/2026-01",
    ),
    "near run": (
        lambda run: run.with_name("2026-01-01_00-00-01"),
        r"does not exist: did you mean .*/2026-01-01_00-00-00\?",
    ),
    "near checkpoint": (
        lambda run: run / "checkpoint" / "run--step=12",
        r"did you mean .*00-00-00/checkpoints/run--step=12\?",
    ),
    "far": (lambda run: run / "qqq" / "zzz", "does not exist: there is no qqq in .*2026-01-01_00-00-00"),
    "nothing near": (lambda run: run / "qqq", "does not exist: give a folder of weights, a run or a checkp"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_leads_nowhere_is_named(finished: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, fault = FAULTS[kind]
    path = make(finished)
    with pytest.raises(UserError, match=fault) as raised:
        locate(path)
    for command in (["export", str(path), str(finished / "out")], ["inspect", str(path)]):
        assert main(command) == 1
        assert f"error: {raised.value}\n" in capsys.readouterr().err
    assert not (finished / "out").exists()


def test_other_kinds_of_weights_are_left_to_their_readers(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    write_hf_folder(hf, CONFIG, fresh(CONFIG))
    run(hf, tmp_path / "shards", tp=2)
    save(hf, 3)  # not what the folder's own weights are
    kinds = [hf, hf / "model.safetensors", tmp_path / "shards", tmp_path / "shards" / "model"]
    assert [locate(path) for path in kinds] == kinds


def test_the_newest_of_nxd_trainings_checkpoints(tmp_path: Path) -> None:
    """Without a record of ours: the step is in the name, and the file ``done`` tells a whole one."""
    write_hf_folder(tmp_path / "hf", CONFIG, fresh(CONFIG))
    folder = tmp_path / "date" / "checkpoints"
    for step in (9, 10, 11):
        run(tmp_path / "hf", folder / f"hf--step={step}-consumed_samples=8.ckpt", tp=2)
    (folder / "hf--step=11-consumed_samples=8.ckpt" / "done").unlink()
    newest = folder / "hf--step=10-consumed_samples=8.ckpt"
    assert [locate(place) for place in (folder, folder.parent, folder / "latest")] == [newest] * 3
    newest.rename(folder / "best")
    with pytest.raises(UserError, match=r"checkpoints of NxD \(best, hf--step=9-.*: name one of them"):
        locate(folder)


# A run through the command line


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """After a run that has a tokenizer of two templates."""
    import nemo.utils.exp_manager  # noqa: F401 (its log handlers keep stderr, which no test may have replaced)

    project = Project.create(tmp_path_factory.mktemp("project"))
    templates = project.root / "tokenizer" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    (project.root / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    assert project.train("data.val_dir=null", "trainer.max_steps=2") == 0
    return project


@pytest.fixture
def short(tmp_path: Path) -> tuple[str, ...]:
    """A short run that names neither tokenizer nor model, in an experiments folder of its own."""
    own = ("data.tokenizer.type=", "model.model_config=null", f"exp_manager.exp_dir={tmp_path}/experiments")
    return (*own, "data.val_dir=null", "trainer.max_steps=1")


@pytest.mark.parametrize("place", ["", "last_checkpoint", "hf_export"])
def test_a_run_starts_from_a_run(
    project: Project, short: tuple[str, ...], place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With its tokenizer and its model's shape."""
    first = project.only_run()
    (checkpoint,) = checkpoints_of(first)
    assert project.train(*short, f"exp_manager.resume_from_checkpoint={first / place}") == 0
    start = f"the Hugging Face folder {first / place}" if place == "hf_export" else f"checkpoint {checkpoint}"
    assert f"a new run, from {start}" in caplog.text
    (second,) = (tmp_path / "experiments" / "run").iterdir()
    (saved,) = checkpoints_of(second)
    assert NativeCheckpoint(saved).names() == NativeCheckpoint(checkpoint).names()
    names = {str(f.relative_to(first / "for_export")) for f in (first / "for_export").rglob("*")}
    assert "additional_chat_templates/tool_use.jinja" in names
    assert names <= {str(f.relative_to(second / "hf_export")) for f in (second / "hf_export").rglob("*")}


def test_plan_and_config_take_a_run_too(
    project: Project, short: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    start = f"exp_manager.resume_from_checkpoint={project.only_run()}"
    for verb in ("plan", "config"):
        assert main([verb, *project.arguments(*short, start)[1:]]) == 0
    assert main(["plan", *project.arguments(*short)[1:]]) == 1
    assert "exp_manager.resume_from_checkpoint: is required" in capsys.readouterr().err


def test_the_export_of_a_run_loads_with_its_tokenizer(project: Project, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run = project.only_run()
    assert main(["export", str(run), str(tmp_path / "out"), "--quiet"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(tokenizer.chat_template) == {"default", "tool_use"}
    assert [describe(run)["path"]] == [str(checkpoint) for checkpoint in checkpoints_of(run)]


def test_the_tokenizer_is_the_nearest_to_the_weights(tmp_path: Path) -> None:
    yaml = tmp_path / "given.yaml"
    yaml.write_text("model_alignment_strategy: {dpo: {}}")
    for name in ("start", "shape"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({}))
    keys = (f"exp_manager.resume_from_checkpoint={tmp_path}/start", f"model.model_config={tmp_path}/shape")

    def found(*more: str) -> str:
        return tokenizer_of(load_config(str(yaml), (*keys, *more)))

    assert found() == ""
    (tmp_path / "shape" / "tokenizer.model").write_text("")
    assert found() == f"{tmp_path}/shape"
    assert found(f"model.model_config={tmp_path}/shape/config.json") == f"{tmp_path}/shape"
    (tmp_path / "start" / "tokenizer.json").write_text("")
    assert found() == f"{tmp_path}/start"
    assert found("data.tokenizer.type=org/name") == "org/name"
    # Checking a configuration imports no torch, writing weights no configuration.
    assert hf_writer._VOCABULARIES == VOCABULARIES
