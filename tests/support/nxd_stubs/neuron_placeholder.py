"""Modules that stand for AWS's Neuron packages while neuronx-distributed is imported on a CPU.

neuronx-distributed imports the compiler's and the kernels' modules at its top, though in CPU mode it
calls none of them. A placeholder can be imported from; using what was imported raises.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar


def _decorator(*functions: Any, **settings: object) -> Any:
    """Leaves a function as it is, with settings or without."""
    return functions[0] if functions else _decorator


class _CollectivesConfig:
    """Of ring attention's neighbours, which no test here asks for."""

    def __init__(self, replica_groups: Sequence[Sequence[int]]) -> None:
        self.rank_src_tgt_pairs: dict[int, list[tuple[int, int]]] = {
            rank: [] for group in replica_groups for rank in group
        }


KNOWN: dict[str, Any] = {
    "neuronxcc.nki._pre_prod_kernels.collectives.CollectivesConfig": _CollectivesConfig,
    "torch_neuronx.utils.get_platform_target": lambda: "trn1",
    "torch_neuronx.xla_impl.ops.nki_jit": _decorator,
    "neuronxcc.nki.jit": _decorator,
    "nki.jit": _decorator,
}
"""What is called while modules are imported, or by layers in CPU mode."""


class AnyAttribute(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder


class Placeholder(metaclass=AnyAttribute):
    """Something of a Neuron package. It can be a default value or an annotation, and nothing else."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError("a Neuron package's function was called, but there is none on this machine")


class PlaceholderModule(ModuleType):
    """Every submodule and every attribute is there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: Sequence[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return KNOWN.get(f"{self.__name__}.{name}", Placeholder)


class Finder:
    """Finds any submodule of the packages that have asked for it."""

    packages: ClassVar[set[str]] = set()

    @classmethod
    def find_spec(
        cls, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if "." not in name or name.partition(".")[0] not in cls.packages:
            return None
        return importlib.machinery.ModuleSpec(name, cls, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return PlaceholderModule(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None: ...


def stand_in(package: str) -> None:
    """Make the package that is being imported, and all below it, placeholders."""
    if not Finder.packages:
        sys.meta_path.append(Finder)  # type: ignore[arg-type]
    Finder.packages.add(package)
    sys.modules[package].__class__ = PlaceholderModule
