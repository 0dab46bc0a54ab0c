#!/usr/bin/env python3
"""Measures of how the package is cut, for one checkout or several side by side.

    scripts/house_table.py [CHECKOUT ...]

CHECKOUT: a folder with src/nxdt_align (default: this one). To compare with an earlier revision:

    git worktree add ../before REVISION && scripts/house_table.py ../before .
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median, quantiles

PACKAGE = "nxdt_align"
Measures = dict[str, str]


class Source:
    """The package of one checkout as text and syntax trees."""

    def __init__(self, checkout: Path) -> None:
        root = checkout / "src" / PACKAGE
        self.files = {
            ".".join(path.relative_to(root).with_suffix("").parts): path.read_text()
            for path in sorted(root.rglob("*.py"))
        }
        self.trees = {name: ast.parse(text) for name, text in self.files.items()}

    def imports(self, name: str) -> set[str]:
        """Modules of the package that ``name`` imports."""
        found = set()
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                base = (node.module or "").removeprefix(PACKAGE).lstrip(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    found.add(inner if inner in self.files else base)
        return {n for n in found if n in self.files} - {name}


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def private_and_used_once(source: Source) -> tuple[int, int]:
    """Private functions and methods that one other place of their file names, and all functions."""
    once = total = 0
    for name, tree in source.trees.items():
        names = Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
        names += Counter(n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute))
        found = functions(tree)
        total += len(found)
        private = [f.name for f in found if f.name.startswith("_") and not f.name.startswith("__")]
        once += sum(names[function] == 1 for function in private)
        assert name in source.files
    return once, total


def comments_per_100(source: Source) -> float:
    """Comment lines per 100 lines that hold code; docstrings count as neither."""
    comments = code = 0
    for name, text in source.files.items():
        docstrings = set()
        for node in ast.walk(source.trees[name]):
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_text and isinstance(node.value.value, str) and node.end_lineno is not None:
                docstrings |= set(range(node.lineno, node.end_lineno + 1))
        lines: dict[str, set[int]] = {"comment": set(), "code": set()}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                lines["comment"].add(token.start[0])
            elif token.string.strip() and token.type != tokenize.ENDMARKER:
                lines["code"] |= set(range(token.start[0], token.end[0] + 1))
        comments += len(lines["comment"])
        code += len(lines["code"] - docstrings)
    return 100 * comments / code


def measure(checkout: Path) -> Measures:
    source = Source(checkout)
    sizes = [len(text.splitlines()) for text in source.files.values()]
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for tree in source.trees.values()
        for node in functions(tree)
    ]
    once, total = private_and_used_once(source)
    importers: dict[str, set[str]] = defaultdict(set)
    inner: Counter[str] = Counter()
    for name in source.files:
        for imported in source.imports(name):
            importers[imported].add(name)
            room = name.partition(".")[0]
            if imported.partition(".")[0] == room and "." in name and "." in imported:
                inner[room] += 1
    names = Counter(name.rpartition(".")[2] for name in source.files if not name.endswith("__init__"))
    twice = sorted(f"{name} x{count}" for name, count in names.items() if count > 1)
    lone = [n for n in source.files if len(importers[n]) == 1 and not n.endswith("__init__")]
    rooms = ", ".join(f"{room} {count}" for room, count in sorted(inner.items()))
    return {
        "files": str(len(sizes)),
        "lines": f"{sum(sizes):,}",
        "file median / p95 (lines)": f"{median(sizes):.0f} / {quantiles(sizes, n=20)[-1]:.0f}",
        "function median / p95 (lines)": f"{median(lengths):.0f} / {quantiles(lengths, n=20)[-1]:.0f}",
        "private functions used once, of all": f"{once} of {total:,}",
        "files with one importer": str(len(lone)),
        "files of 20 to 50 lines": str(sum(20 <= size <= 50 for size in sizes)),
        "file names used twice": ", ".join(twice),
        "comment lines per 100 lines of code": f"{comments_per_100(source):.1f}",
        "arrows within a room": f"{sum(inner.values())} ({rooms})",
    }


def main() -> None:
    checkouts = [Path(argument) for argument in sys.argv[1:]] or [Path(__file__).resolve().parent.parent]
    found = [measure(checkout) for checkout in checkouts]
    print("| measure | " + " | ".join(checkout.resolve().name for checkout in checkouts) + " |")
    print("|---" * (len(found) + 1) + "|")
    for name in found[0]:
        print(f"| {name} | " + " | ".join(measures[name] for measures in found) + " |")


if __name__ == "__main__":
    main()
