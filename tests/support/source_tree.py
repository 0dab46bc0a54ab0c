"""The package as syntax trees, for the tests that hold its source to rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "nxdt_align"
SOURCE = Path(__file__).resolve().parents[2] / "src" / PACKAGE


@dataclass(frozen=True)
class Module:
    """One file of the package; `name` is dotted and without the package, "" for its __init__."""

    name: str
    tree: ast.Module
    is_package: bool

    def imports(self) -> Iterator[str]:
        """Absolute dotted name of everything imported anywhere in the file."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                base = self._base_of(node)
                yield from (f"{base}.{alias.name}" for alias in node.names)

    def _base_of(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        here = [PACKAGE, *filter(None, self.name.split("."))]
        parents = here[: len(here) - node.level + self.is_package]
        return ".".join([*parents, *filter(None, [node.module])])


def read_modules(source: Path) -> list[Module]:
    """Every file under the package folder `source`."""
    modules = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, ast.parse(path.read_text(encoding="utf-8"), str(path)), is_package))
    return modules


def make_package(folder: Path, files: dict[str, str]) -> list[Module]:
    """A package of `files` (path in the package, text), written to `folder`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_modules(folder)
