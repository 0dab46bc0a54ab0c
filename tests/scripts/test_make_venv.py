"""scripts/make_venv.sh with recorders for interpreters: the one it takes, what it installs in what order."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

# Stands for a python: in range, makes an environment that holds another recorder, "installs" anything.
WORKING = """#!/bin/sh
echo "$(basename "$0") $*" >> "{calls}"
case "$*" in
  --version) echo "Python 3.12.0" ;;
  "-m venv "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
esac
"""
BROKEN_SHIM = '#!/bin/sh\necho "command not found" >&2\nexit 127\n'


class Machine:
    """A PATH of its own, with the given interpreters and nothing else but what the script needs."""

    def __init__(self, repo: Path, folder: Path) -> None:
        self.script = repo / "scripts" / "make_venv.sh"
        self.repo = repo
        self.calls = folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.venv = folder / "venv"
        for tool in ("bash", "sh", "dirname", "basename", "mkdir", "cp"):
            self.bin.joinpath(tool).symlink_to(str(shutil.which(tool)))

    def add(self, name: str, text: str = WORKING) -> Path:
        path = self.bin / name
        path.write_text(text.format(calls=self.calls))
        path.chmod(0o755)
        return path

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), **variables}
        command = [str(self.script), str(self.venv)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    @property
    def installs(self) -> list[str]:
        lines = self.calls.read_text().splitlines()
        return [line.split("pip ")[1] for line in lines if " -m pip " in line]


@pytest.fixture
def machine(repo: Path, tmp_path: Path) -> Machine:
    return Machine(repo, tmp_path)


def test_passes_over_an_interpreter_that_does_not_run(machine: Machine) -> None:
    machine.add("python3.11", BROKEN_SHIM)
    machine.add("python3.12")
    machine.add("python3")
    assert machine.run().returncode == 0
    assert f"python3.12 -m venv --clear {machine.venv}" in machine.calls.read_text().splitlines()


def test_installs_torch_first_then_the_package_then_checks(machine: Machine) -> None:
    machine.add("python3")
    machine.run(PIP_ARGS="--extra-index-url somewhere")
    quiet = "--disable-pip-version-check install --quiet --extra-index-url somewhere"
    assert machine.installs == [
        f"{quiet} torch==2.13.0",
        f"{quiet} --editable {machine.repo}[test]",
        "--disable-pip-version-check check",
    ]


def test_torch_can_be_chosen(machine: Machine) -> None:
    machine.add("python3")
    machine.run(TORCH="torch==2.9.0 torch_xla==2.9.0")
    assert machine.installs[0].endswith("--quiet torch==2.9.0 torch_xla==2.9.0")


def test_environment_that_works_is_kept(machine: Machine) -> None:
    machine.add("python3")
    machine.run()
    machine.run()
    assert machine.calls.read_text().count("-m venv") == 1


def test_chosen_interpreter_is_not_replaced_by_another(machine: Machine) -> None:
    machine.add("python3")
    chosen = machine.add("mine", BROKEN_SHIM)
    done = machine.run(PYTHON=str(chosen))
    assert done.returncode == 1
    assert f"error: {chosen} is not a working Python 3.10 to 3.13" in done.stderr
    assert not machine.venv.exists()


def test_machine_without_python_is_told_what_to_install(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
