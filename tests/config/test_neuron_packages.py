"""The Neuron packages: real ones, missing ones, and PyPI's placeholders, made as they are installed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from nxdt_align.config.neuron_packages import (
    NEURON_INDEX,
    find_missing_neuron_packages,
    mixed_products_fault,
    neuron_available,
    neuron_stack,
    torch_neuron_fault,
)

MODULES = {
    "torch-neuronx": "torch_neuronx",
    "neuronx-cc": "neuronxcc",
    "libneuronxla": "libneuronxla",
    "neuronx-distributed": "neuronx_distributed",
    "torch-xla": "torch_xla",
}
NKI = "nki"
"""TorchNeuron's alone, which imports it."""


class Site:
    """The only folder that modules and distributions are found in."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr("sys.path", [str(folder)])
        monkeypatch.setattr("sys.meta_path", [importlib.machinery.PathFinder])
        for module in (*MODULES.values(), NKI):
            monkeypatch.delitem(importlib.sys.modules, module, raising=False)  # type: ignore[attr-defined]

    def install(self, package: str, version: str = "1.0", *, placeholder: bool = False) -> None:
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        if not placeholder:
            module = self.folder / MODULES.get(package, package)
            module.mkdir(exist_ok=True)
            (module / "__init__.py").write_text("raise SystemExit('only looked for, never imported')")
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path / "site", monkeypatch)


def test_all_real(site: Site) -> None:
    for package in MODULES:
        site.install(package)
    assert find_missing_neuron_packages() is None
    assert find_missing_neuron_packages(cpu_mode=True) is None
    assert neuron_available()


def test_none_there(site: Site) -> None:
    message = find_missing_neuron_packages()
    assert message is not None
    assert (
        "not installed: torch-neuronx, neuronx-cc, libneuronxla, neuronx-distributed, torch-xla." in message
    )
    assert "placeholder" not in message and "uninstall" not in message
    assert f"({NEURON_INDEX}): pip install -r requirements_dpo.txt" in message
    assert "distributed_strategy.engine=native runs without" in message
    assert not neuron_available()


def test_placeholders_are_told_from_missing_packages(site: Site) -> None:
    site.install("torch-xla")
    site.install("libneuronxla")
    for package in ("torch-neuronx", "neuronx-distributed"):
        site.install(package, placeholder=True)
    message = find_missing_neuron_packages()
    assert message is not None
    assert "not installed: neuronx-cc;" in message
    assert "instead of the package: torch-neuronx, neuronx-distributed." in message
    assert "pip uninstall -y torch-neuronx neuronx-distributed, then pip install -r" in message
    assert not neuron_available()


def test_cpu_mode_needs_neither_compiler_nor_runtime(site: Site) -> None:
    site.install("torch-xla")
    assert "not installed: neuronx-distributed." in str(find_missing_neuron_packages(cpu_mode=True))
    site.install("neuronx-distributed")
    assert find_missing_neuron_packages(cpu_mode=True) is None
    assert "torch-neuronx" in str(find_missing_neuron_packages())


def test_a_folder_of_the_name_without_code_is_no_package(site: Site) -> None:
    """A checkout's folder on the path, or what an uninstall left behind."""
    for package in MODULES:
        site.install(package)
    (site.folder / "torch_neuronx" / "__init__.py").unlink()
    importlib.invalidate_caches()
    assert "placeholder" in str(find_missing_neuron_packages())
    assert not neuron_available()


NATIVE, XLA = "2.13.3.0.71", "2.9.0.2.13.26312"


@pytest.mark.parametrize(("version", "stack"), [(NATIVE, "native"), ("2.14.3.0.1", "native"), (XLA, "xla")])
def test_which_of_two_products_is_called_torch_neuronx(site: Site, version: str, stack: str) -> None:
    """Engine nxd is chosen for PyTorch/XLA's alone, whatever else is there."""
    site.install("torch-neuronx", version)
    assert neuron_stack() == stack and not neuron_available()
    site.install("neuronx-distributed")
    assert neuron_available() == (stack == "xla")


@pytest.mark.parametrize(
    ("installed", "torch", "python", "said"),
    [
        (
            [],
            "2.13.0",
            (3, 12),
            r"torch-neuronx is not installed: on trn2 .*requirements_neuron.txt; trn1 has",
        ),
        (
            [("torch-neuronx", XLA)],
            "2.13.0",
            (3, 12),
            r"installed \(2.9.0.2.13.26312\) is PyTorch/XLA's, for e",
        ),
        (
            [("torch-neuronx", NATIVE)],
            "2.13.0+cpu",
            (3, 11),
            r"Python 3.12 or 3.13 here, but this is 3.11: in an",
        ),
        (
            [("torch-neuronx", NATIVE)],
            "2.15.0",
            (3, 12),
            r"2.13.3.0.71 goes with torch 2.13, but torch is 2.15",
        ),
        (
            [("torch-neuronx", NATIVE)],
            "2.13.0",
            (3, 12),
            r"imports the package nki, which is not installed: requirements_neuron.txt has",
        ),
        (
            [("torch-neuronx", NATIVE), ("torch-xla", "2.9.0")],
            "2.13.0",
            (3, 12),
            r"both products .*\(torch-neuronx 2.13.3.0.71, torch-xla\).* or here pip uninstall -y torch-xla",
        ),
        (
            [("torch-neuronx", NATIVE), ("torch-neuronx", XLA)],
            "2.13.0",
            (3, 12),
            r"both products .*torch-neuronx 2.9.0.*or here pip uninstall -y torch-neuronx",
        ),
    ],
)
def test_why_torch_has_no_neuron_device(
    site: Site, installed: list[tuple[str, str]], torch: str, python: tuple[int, int], said: str
) -> None:
    for package, version in installed:
        site.install(package, version)
    assert re.search(said, str(torch_neuron_fault(torch, python))), torch_neuron_fault(torch, python)
    assert (mixed_products_fault() is not None) == ("both products" in said)


def test_nothing_is_wrong_with_the_product_that_fits(site: Site) -> None:
    site.install("torch-neuronx", NATIVE)
    site.install(NKI)
    assert torch_neuron_fault("2.13.0", (3, 12)) is None and mixed_products_fault() is None


def test_the_pythons_are_those_that_this_package_takes(repo: Path) -> None:
    told = "Python 3.12 or 3.13"
    assert 'requires-python = ">=3.10,<3.14"' in (repo / "pyproject.toml").read_text()
    assert all(told in (repo / file).read_text() for file in ("requirements_neuron.txt", "docs/trn2.md"))


def test_the_index_is_that_of_the_requirements(repo: Path) -> None:
    text = (repo / "requirements_dpo.txt").read_text()
    assert f"--extra-index-url {NEURON_INDEX}\n" in text
    assert all(f"\n{package}==" in text for package in MODULES)
