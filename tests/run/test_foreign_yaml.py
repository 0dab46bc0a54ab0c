"""What a YAML of another's may make this package run: nothing but a part that is what it must be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from training_fixture import Project

from nxdt_align.cli import main
from nxdt_align.losses.custom import load_loss
from nxdt_align.own_parts import OwnPartError, find, find_class, require_call

OWN = """
import functools, os, subprocess, code, operator, typing
from subprocess import Popen
from hydra.utils import instantiate
from torch.nn.functional import cross_entropy

open("imported.txt", "a").write("x")
run = functools.partial(subprocess.run, shell=True)
twice = functools.partial(functools.partial(os.system))
method = code.InteractiveInterpreter().runsource
caller = operator.methodcaller("system", "touch ran")
bound = [].append

def wrapped(policy, reference):
    return None

wrapped = functools.wraps(subprocess.run)(wrapped)

def loose(*arguments, **settings):
    open("ran", "w").close()

class Format:
    def __init__(self, record):
        open("ran", "w").close()

class Opens:
    def __init__(self, file):
        open(file, "w").close()

class Loose(Opens):
    def __call__(self, *arguments, **settings):
        return arguments

def plain(record):
    return {"prompt": record["prompt"], "chosen": record["chosen"], "rejected": record["rejected"]}

def loss(policy, reference):
    return -(policy.chosen_logps - policy.rejected_logps), policy.chosen_logps, policy.rejected_logps
"""

LOSS, FORMAT = ("policy", "reference"), ("record",)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "foreign_parts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_parts", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        *("subprocess.Popen", "os.system", "posix.system", "builtins.exec", "importlib.import_module"),
        *("functools.partial", "pickle.loads", "_pickle.loads", "test.support.run_code", "shutil.rmtree"),
        *("idlelib.run.main", "pip.__main__.main", "antigravity.webbrowser"),
        *("foreign_parts.Popen", "foreign_parts.run", "foreign_parts.twice", "foreign_parts.method"),
        *("foreign_parts.caller", "foreign_parts.bound", "foreign_parts.wrapped", "foreign_parts.typing"),
        *("foreign_parts.subprocess", "torch.os", "torch.functools", "yaml.dump_all.__globals__"),
    ],
)
def test_the_standard_library_is_no_part_whatever_it_is_called(path: str) -> None:
    with pytest.raises(
        OwnPartError, match=r"standard library|must be a class|as a program|cannot import|has no"
    ):
        find(path)
    assert "antigravity" not in sys.modules and "idlelib" not in sys.modules


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        *[(f"torch.{name}", LOSS) for name in ("load", "save", "hub.load", "utils.cpp_extension.load")],
        *[("hydra.utils.instantiate", arguments) for arguments in (LOSS, FORMAT)],
        *[("foreign_parts.instantiate", arguments) for arguments in (LOSS, FORMAT)],
        *[("foreign_parts.loose", arguments) for arguments in (LOSS, FORMAT)],
        *[("foreign_parts.cross_entropy", LOSS), ("foreign_parts.Format", FORMAT)],
        *[
            (name, FORMAT)
            for name in ("dill.loads", "joblib.load", "pandas.read_pickle", "numpy.load", "torch.jit.load")
        ],
        *[("lightning.pytorch.cli.instantiate_class", LOSS), ("torch.ops.load_library", FORMAT)],
        *[("nxdt_align.own_parts.find", FORMAT), ("nxdt_align.cli.main", FORMAT)],
    ],
)
def test_a_callable_must_be_what_its_key_says(path: str, arguments: tuple[str, ...]) -> None:
    found = find(path)
    with pytest.raises(OwnPartError, match=rf"{path}: it must be called as \({', '.join(arguments)}\)"):
        require_call(found, path, *arguments)


@pytest.mark.parametrize("name", ["Opens", "Loose"])
def test_no_object_is_made_of_a_class_that_is_no_loss(name: str, folder: Path) -> None:
    with pytest.raises(OwnPartError, match=r"must be called as \(policy, reference\)"):
        load_loss(f"foreign_parts.{name}", {"file": "ran"})
    assert not (folder / "ran").exists()


def test_parts_of_installed_packages_that_are_what_they_must_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchtune's losses, PyTorch's optimizers and Lightning's callbacks."""
    import lightning.pytorch
    import torch

    site = folder / "site-packages" / "torchtune_like"
    site.mkdir(parents=True)
    text = (folder / "foreign_parts.py").read_text().partition("def loss")[2].partition("\n")[2]
    head = (
        "def __init__(self, beta=0.1): pass\n    def __call__(self, policy_inputs, reference_inputs):\n    "
    )
    loss = head + text.replace("policy.", "policy_inputs.")
    (site / "__init__.py").write_text("class DPOLoss:\n    " + loss)
    monkeypatch.syspath_prepend(str(site.parent))
    assert load_loss("torchtune_like.DPOLoss", {"beta": 0.2}).paired
    assert find_class("torch.optim.SGD", torch.optim.Optimizer) is torch.optim.SGD
    callback = lightning.pytorch.Callback
    assert issubclass(find_class("lightning.pytorch.callbacks.LearningRateMonitor", callback), callback)


@pytest.fixture
def project(folder: Path) -> Project:
    return Project.create(folder)


def write(project: Project, section: str, **values: object) -> None:
    """Add ``values`` to the YAML, which is another's."""
    path = project.root / "conf" / "run.yaml"
    content = yaml.safe_load(path.read_text())
    content[section].update(values)
    path.write_text(yaml.safe_dump(content))


POPEN = {"loss": "subprocess.Popen", "loss_settings": {"args": "touch ran", "shell": True}}


@pytest.mark.parametrize("verb", ["config", "plan", "train"])
def test_a_yaml_runs_no_command(project: Project, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    write(project, "model_alignment_strategy", **POPEN)
    assert main([verb, *project.arguments()[1:]]) == 1
    said = capsys.readouterr().err
    assert (
        "model_alignment_strategy.loss: must be a part of your own, but subprocess.Popen is of Python's"
        in said
    )
    assert not (project.root / "ran").exists()


def test_what_does_not_train_imports_nothing_that_the_yaml_names(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, "model_alignment_strategy", loss="foreign_parts.loss")
    name, seen = project.arguments()[1:], project.root / "imported.txt"
    assert main(["config", *name]) == 0
    said = capsys.readouterr()
    assert json.loads(json.dumps(yaml.safe_load(said.out)))["data"]["seq_length"] == 128
    assert "trains imports (model_alignment_strategy.loss (foreign_parts.loss))" in said.err
    assert main(["plan", *name]) == 0
    assert "model_alignment_strategy.loss (foreign_parts.loss): not imported" in capsys.readouterr().out
    write(project, "data", format="foreign_parts.plain")
    assert main(["plan", *name]) == 1
    assert "--import-own-parts imports it here" in capsys.readouterr().err
    assert not seen.exists()
    assert main(["plan", *name, "--import-own-parts"]) == 0
    assert seen.read_text() == "x" and "not imported" not in capsys.readouterr().out


def test_a_part_that_is_named_on_the_command_line_is_the_users_word(project: Project) -> None:
    assert main(["plan", *project.arguments("data.format=foreign_parts.plain")[1:]]) == 0
    assert (project.root / "imported.txt").exists()


def test_training_names_the_parts_that_it_imports(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, "model_alignment_strategy", loss="foreign_parts.loss")
    write(project, "data", format="foreign_parts.plain")
    assert main(["train", *project.arguments("trainer.max_steps=1", "data.val_dir=null")[1:]]) == 0
    said = capsys.readouterr().err
    file = project.root / "foreign_parts.py"
    assert f"own part: foreign_parts.loss, of {file}" in said
    assert f"own part: foreign_parts.plain, of {file}" in said
