"""The files that say what is installed agree with each other and with what the project promises."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import nxdt_align

NEURON = {"torch-neuronx", "neuronx-cc", "neuronx-distributed", "libneuronxla", "torch", "torch-xla"}
IMPORTED_BY_NXD = {"boto3", "botocore", "requests"}


def listed(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.fixture(scope="module")
def pyproject(repo: Path) -> str:
    return (repo / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def dependencies(pyproject: str) -> dict[str, Requirement]:
    """The package's own, without extras. Read as text: Python 3.10 has no TOML reader."""
    block = pyproject.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    return listed(re.findall(r'^\s*"([^"]+)",', block, re.MULTILINE))


@pytest.fixture(scope="module")
def trn1(repo: Path) -> dict[str, Requirement]:
    return required(repo / "requirements_dpo.txt")


@pytest.fixture(scope="module")
def trn2(repo: Path) -> dict[str, Requirement]:
    return required(repo / "requirements_neuron.txt")


def required(file: Path) -> dict[str, Requirement]:
    lines = file.read_text().splitlines()
    return listed([line for line in lines if line and not line.startswith(("#", "--"))])


def test_trn1_node_gets_every_dependency_in_the_same_range(
    dependencies: dict[str, Requirement], trn1: dict[str, Requirement]
) -> None:
    own = NEURON | IMPORTED_BY_NXD
    ranges = {name: requirement.specifier for name, requirement in trn1.items() if name not in own}
    assert ranges == {name: wanted.specifier for name, wanted in dependencies.items() if name != "torch"}


def test_trn1_node_takes_neuron_packages_by_exact_version_from_their_index(
    repo: Path, trn1: dict[str, Requirement]
) -> None:
    """A range would let pip choose a placeholder of the same name."""
    text = (repo / "requirements_dpo.txt").read_text()
    assert "--extra-index-url https://pip.repos.neuron.amazonaws.com" in text.splitlines()
    assert trn1.keys() >= NEURON | IMPORTED_BY_NXD
    assert all(str(trn1[name].specifier).startswith("==") for name in NEURON)


def test_trn2_node_gets_the_same_and_torchneuron_alone(
    repo: Path, dependencies: dict[str, Requirement], trn2: dict[str, Requirement]
) -> None:
    own = {"torch-neuronx", "neuronx-cc", "nki", "torch"}
    assert own <= trn2.keys() and not trn2.keys() & {"torch-xla", "neuronx-distributed", "libneuronxla"}
    ranges = {name: requirement.specifier for name, requirement in trn2.items() if name not in own}
    assert ranges == {name: wanted.specifier for name, wanted in dependencies.items() if name != "torch"}
    assert all(str(trn2[name].specifier).startswith("==") for name in own)
    # The product's releases are named after the torch that they go with.
    assert str(trn2["torch"].specifier) == "==2.13.0" and "2.13.3.0.1" in trn2["torch-neuronx"].specifier
    text = (repo / "requirements_neuron.txt").read_text()
    assert "--extra-index-url https://pip.repos.neuron.amazonaws.com" in text.splitlines()


@pytest.mark.parametrize("version", ["2.9.0", "2.9.1", "2.13.0", "2.15.0"])
def test_package_accepts_the_torch_of_either_side(dependencies: dict[str, Requirement], version: str) -> None:
    assert version in dependencies["torch"].specifier


@pytest.mark.parametrize("version", ["2.8.0", "2.16.0"])
def test_package_refuses_other_torch(dependencies: dict[str, Requirement], version: str) -> None:
    assert version not in dependencies["torch"].specifier


def test_environment_meets_the_requirements(dependencies: dict[str, Requirement]) -> None:
    installed = {name: metadata.version(name) for name in dependencies}
    wrong = {
        n: v for n, v in installed.items() if not dependencies[n].specifier.contains(v, prereleases=True)
    }
    assert wrong == {}


def test_python_range_is_that_of_the_makefile(repo: Path, pyproject: str) -> None:
    wanted = SpecifierSet(re.findall(r'requires-python = "([^"]+)"', pyproject)[0])
    minors = [minor for minor in range(8, 16) if f"3.{minor}" in wanted]
    assert minors == [10, 11, 12, 13]
    assert ((3, minors[0]), (3, minors[-1])) == nxdt_align.PYTHON
    assert "(3, 10) <= sys.version_info[:2] <= (3, 13)" in (repo / "scripts" / "make_venv.sh").read_text()


def test_licence_is_apache_2(repo: Path, pyproject: str) -> None:
    text = (repo / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in pyproject


def test_version_is_the_packages() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", nxdt_align.__version__)


def test_ruff_passes_no_file_over(repo: Path) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--show-files"]
    shown = subprocess.run(ruff, cwd=repo, capture_output=True, text=True, check=True).stdout
    wanted = [str(path) for path in (repo / "src").rglob("*.py")]
    assert set(wanted) <= set(shown.splitlines())
