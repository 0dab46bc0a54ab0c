"""Which of AWS Neuron's Python packages are installed, and what a run is missing; none is imported for that.

Two products are called torch-neuronx: up to 2.9 PyTorch/XLA's device of trn1, which engine nxd runs on, and
later TorchNeuron, PyTorch's own device ``neuron`` of trn2 and trn3, for engine native. They share a
distribution's and a module's name, so an environment holds one of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from typing import Literal

NEURON_INDEX = "https://pip.repos.neuron.amazonaws.com"
"""AWS's own package index, as in requirements_dpo.txt and requirements_neuron.txt."""
TORCH_NEURON_PYTHON = (3, 12)
"""The first Python that TorchNeuron comes for."""

Stack = Literal["xla", "native"]
"""Of which product the torch-neuronx is that is installed."""

_APART = "in an environment of its own, pip install -r requirements_neuron.txt"
_LAST_OF_XLA = (2, 9)
_CPU_MODE_PACKAGES = {"neuronx-distributed": "neuronx_distributed", "torch-xla": "torch_xla"}
_NEURON_PACKAGES = {
    "torch-neuronx": "torch_neuronx",
    "neuronx-cc": "neuronxcc",
    "libneuronxla": "libneuronxla",
    **_CPU_MODE_PACKAGES,
}
"""Package -> the module that it provides."""
_OF_XLA_ALONE = tuple(_CPU_MODE_PACKAGES)
"""Not libneuronxla, of which AWS does not say that TorchNeuron does without it."""


def neuron_available() -> bool:
    """Whether the real packages of engine nxd are installed. PyPI's placeholders of these names hold no
    module."""
    return neuron_stack() == "xla" and has_module("neuronx_distributed")


def neuron_stack() -> Stack | None:
    """None where there is no torch-neuronx, or PyPI's placeholder."""
    if not has_module("torch_neuronx"):
        return None
    versions = _versions("torch-neuronx")
    if not versions:  # a folder on the path
        return "xla" if has_module("torch_xla") else "native"
    return "native" if any(_release(version) > _LAST_OF_XLA for version in versions) else "xla"


def torch_neuron_fault(torch_version: str, python: Sequence[int] = sys.version_info[:2]) -> str | None:
    """Why torch has no device ``neuron`` here, as far as packages tell, and what to do; None if they do not.

    Args:
        torch_version: that of the torch which runs.
        python: this interpreter's version, major and minor first.
    """
    stack, versions = neuron_stack(), _versions("torch-neuronx")
    if stack is None:
        return f"torch-neuronx is not installed: on trn2 and trn3, {_APART}; trn1 has engine nxd alone"
    if stack == "xla":
        return (
            f"the torch-neuronx that is installed ({', '.join(versions) or 'without a version'}) is PyTorch/"
            f"XLA's, for engine nxd (distributed_strategy.engine=nxd, trn1); on trn2 and trn3, {_APART}"
        )
    mixed = mixed_products_fault()
    if mixed is not None:
        return mixed
    if tuple(python[:2]) < TORCH_NEURON_PYTHON:
        # It comes for 3.14, too, but this package's own metadata ends at 3.13.
        return f"TorchNeuron needs Python 3.12 or 3.13 here, but this is {python[0]}.{python[1]}: {_APART}"
    if versions and _release(versions[0]) != _release(torch_version):
        wanted = ".".join(map(str, _release(versions[0])))
        return (
            f"torch-neuronx {versions[0]} goes with torch {wanted}, but torch is {torch_version}: "
            "requirements_neuron.txt has a pair that fits"
        )
    if not has_module("nki"):
        return "TorchNeuron imports the package nki, which is not installed: requirements_neuron.txt has it"
    return None


def mixed_products_fault() -> str | None:
    """What to do where TorchNeuron is installed beside packages of PyTorch/XLA's product; None where it is
    not."""
    if neuron_stack() != "native":
        return None
    versions = _versions("torch-neuronx")
    left = [name for name in _OF_XLA_ALONE if has_module(_NEURON_PACKAGES[name])]
    if not left and len(versions) < 2:
        return None
    found = [*(f"torch-neuronx {version}" for version in versions), *left]
    return (
        "this environment holds packages of both products that are called torch-neuronx, TorchNeuron and "
        f"PyTorch/XLA's ({', '.join(found)}), which do not work beside each other: {_APART}, or here pip "
        f"uninstall -y {' '.join(left or ['torch-neuronx'])}"
    )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor, as of torch: torch-neuronx 2.13.3.0.1 goes with torch 2.13."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _versions(package: str) -> list[str]:
    """Of every distribution of that name on the path."""
    return [found.version for found in importlib.metadata.distributions(name=package)]


def find_missing_neuron_packages(cpu_mode: bool = False) -> str | None:
    """Which packages engine nxd is missing, and what to do; None if it has all of them.

    Args:
        cpu_mode: NXD_CPU_MODE=1, which needs neither compiler nor runtime.
    """
    wanted = _CPU_MODE_PACKAGES if cpu_mode else _NEURON_PACKAGES
    absent = [package for package, module in wanted.items() if not has_module(module)]
    if not absent:
        return None
    hollow = [package for package in absent if _versions(package)]
    missing = [package for package in absent if package not in hollow]
    faults = []
    if missing:
        faults.append(f"not installed: {', '.join(missing)}")
    if hollow:
        faults.append(f"PyPI's empty placeholder is installed instead of the package: {', '.join(hollow)}")
    remove = f"pip uninstall -y {' '.join(hollow)}, then " if hollow else ""
    return (
        f"engine nxd needs packages of AWS Neuron. {'; '.join(faults)}. Install them from AWS's own index "
        f"({NEURON_INDEX}): {remove}pip install -r requirements_dpo.txt. "
        "distributed_strategy.engine=native runs without them"
    )


def has_module(name: str) -> bool:
    """Whether ``name`` can be imported; a folder of that name without code does not count."""
    spec = importlib.util.find_spec(name)
    # A namespace package has a spec without an origin: any folder of that name on the path is one.
    return spec is not None and spec.origin is not None
