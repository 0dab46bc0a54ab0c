"""The wheel alone, away from the source: built and installed with the packages here, downloading nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from training_fixture import Project

NOTHING_FROM_ELSEWHERE = ("--no-index", "--no-deps", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git would ship, as setuptools leaves its folders beside the source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, source)
    shutil.copytree(repo / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", *NOTHING_FROM_ELSEWHERE]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, cwd=folder, timeout=300)
    shutil.rmtree(source)
    (built,) = folder.glob("*.whl")
    return built


class Installed:
    """A virtual environment with the wheel; its other packages are those of the environment of the tests."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.bin = folder / "venv" / "bin"
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=300
        )
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        target = ("--target", str(site), "--no-compile")
        pip = [sys.executable, "-m", "pip", "install", *NOTHING_FROM_ELSEWHERE, *target, str(wheel)]
        subprocess.run(pip, check=True, timeout=300)
        # A folder that a .pth file names has its own .pth files not read: no editable install of a checkout
        # comes along.
        (site / "theirs.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        self.program = self.bin / "nxdt-align"
        entry = "import sys\nfrom nxdt_align.__main__ import main\nsys.exit(main())\n"
        self.program.write_text(f"#!{self.bin / 'python'}\n{entry}")
        self.program.chmod(0o755)

    def __call__(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return subprocess.run(
            command,
            cwd=cwd,
            env={
                **kept,
                "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=600,
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_it_holds_the_configs_and_train_sh(wheel: Path, repo: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    configs = {Path(name).name for name in names if name.startswith("nxdt_align/conf/")}
    assert configs == {file.name for file in (repo / "conf").glob("*.yaml")}
    assert {"nxdt_align/train.sh", "nxdt_align/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "examples", "demo"))]


def test_it_is_what_runs(installed: Installed, tmp_path: Path) -> None:
    where = installed("python", "-c", "import nxdt_align; print(nxdt_align.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed.bin.parent)


def test_presets_and_config(installed: Installed, tmp_path: Path) -> None:
    listed = installed("nxdt-align", "presets", cwd=tmp_path)
    assert listed.returncode == 0 and "tiny_llama_DPO_config" in listed.stdout, listed.stderr
    shown = installed(
        "nxdt-align", "config", "--no-check", "--config-name", "tiny_llama_DPO_config", cwd=tmp_path
    )
    assert shown.returncode == 0 and "name: tiny_llama_DPO" in shown.stdout, shown.stderr


@pytest.mark.full
def test_it_trains(installed: Installed, tmp_path: Path) -> None:
    """One of its own configs, on the user's files."""
    project = Project.create(tmp_path)
    overrides = [
        f"data.train_dir={project.root}/train.jsonl",
        f"data.val_dir={project.root}/val.jsonl",
        f"data.tokenizer.type={project.root}/tokenizer",
        f"model.model_config={project.root}/config.json",
        "exp_manager.resume_from_checkpoint=null",
        "trainer.max_steps=2",
        "data.global_batch_size=4",
        "data.micro_batch_size=1",
        "trainer.val_check_interval=2",
    ]
    done = installed(
        "nxdt-align", "train", "--config-name", "tiny_llama_DPO_config", *overrides, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (export,) = tmp_path.glob("nemo_experiments/tiny_llama_DPO/*/hf_export")
    assert (export / "model.safetensors").is_file()


def test_train_sh_of_the_wheel_takes_the_users_yaml(installed: Installed, tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    yaml = str(project.root / "conf" / "run.yaml")
    done = installed("nxdt-align", "launch", "--print-env", cwd=tmp_path, CONF_FILE=yaml)
    assert done.returncode == 0 and "no NeuronCores" in done.stderr, done.stderr
    path = installed("nxdt-align", "launch", "--path", cwd=tmp_path).stdout.strip()
    copy = Path(shutil.copy(path, project.root / "train.sh"))
    done = installed("bash", str(copy), "trainer.max_steps=2", cwd=project.root, CONF_FILE=yaml)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done: 2 steps" in done.stdout


def test_without_an_environment_train_sh_says_what_to_run(installed: Installed, tmp_path: Path) -> None:
    path = installed("nxdt-align", "launch", "--path", cwd=tmp_path).stdout.strip()
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=300)
    python = str(bare / "bin" / "python")
    done = installed("bash", path, cwd=tmp_path, NXDT_ALIGN_PYTHON=python)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {python} has no nxdt_align, torch, lightning, omegaconf, hydra: ")
    assert "install nxdt-align there" in line


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import sys; sys.version_info = (3, 9, 1, 'final', 0); from nxdt_align.__main__ import main; "
            "sys.exit(main())",
            "error: nxdt-align runs on Python 3.10 to 3.13, but this is 3.9 ",
        ),
        (
            "import sys, importlib.metadata as m; m.version = lambda name: '2.8.0+cpu'; sys.argv[1:] = "
            "['inspect', '.']; from nxdt_align.__main__ import main; sys.exit(main())",
            "error: nxdt-align runs on torch 2.9 to 2.15, but {python} has 2.8.0+cpu; pip install torch==2.1",
        ),
    ],
    ids=["python", "torch"],
)
def test_a_version_out_of_range_is_one_line(
    installed: Installed, tmp_path: Path, code: str, message: str
) -> None:
    done = installed("python", "-c", code, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(message.format(python=installed.bin / "python"))
