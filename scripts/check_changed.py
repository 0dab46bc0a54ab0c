#!/usr/bin/env python3
"""The tests of what a change touches, for "make check": prints the files for pytest, one per line.

    scripts/check_changed.py [BASE]

BASE: what the change is against (default: HEAD, or HEAD~1 where nothing is uncommitted). A module of the
package brings the tests of its room that import it, or the whole room's where none does; a test itself.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
ALWAYS = ("tests/test_import_rules.py", "tests/test_source_safety.py")
OUTSIDE = {"examples": "tests/examples", "scripts": "tests/scripts", "benchmarks": "tests/benchmarks"}
DOCUMENTS = "tests/docs"


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def changed_files(base: str | None) -> list[str]:
    """Files that differ from ``base``, and those that git does not track yet."""
    untracked = git("ls-files", "--others", "--exclude-standard")
    if base is None:
        base = "HEAD" if untracked or git("diff", "--name-only", "HEAD") else "HEAD~1"
    return [*git("diff", "--name-only", base), *untracked]


def tests_of(file: str) -> Iterator[str]:
    """Test files and folders that a change of ``file`` asks for."""
    path = Path(file)
    top = path.parts[0]
    if file.endswith(".md") or file == "mkdocs.yml":
        yield DOCUMENTS
    elif top == "tests":
        is_test = path.name.startswith("test_") and (REPO / path).is_file()
        yield from [file] if is_test else users_of(path.stem, REPO / "tests")
    elif file.startswith("src/nxdt_align/") and path.suffix == ".py":
        inside = path.with_suffix("").parts[2:]
        room = REPO / "tests" / inside[0] if len(inside) > 1 else REPO / "tests"
        yield from users_of(".".join(inside).removesuffix(".__init__"), room)
    elif file.startswith("src/nxdt_align/"):
        yield from ("tests/config", "tests/scripts", "tests/test_wheel.py")
    elif top in OUTSIDE:
        yield OUTSIDE[top]
    elif file == "pyproject.toml":
        yield "tests/test_packaging.py"


def users_of(module: str, room: Path) -> list[str]:
    """Tests under ``room`` whose text names ``module``; the room itself where there are none."""
    parent, _, name = module.rpartition(".")
    spellings = (module, f"{parent} import {name}")
    named = [
        str(test.relative_to(REPO))
        for test in sorted(room.rglob("test_*.py"))
        if any(spelling in test.read_text() for spelling in spellings)
    ]
    is_room = room != REPO / "tests" and room.is_dir()
    return named or ([str(room.relative_to(REPO))] if is_room else [])


def main() -> None:
    base = sys.argv[1] if len(sys.argv) > 1 else None
    wanted = {test for file in changed_files(base) for test in tests_of(file)}
    print("\n".join(sorted(wanted | set(ALWAYS))))


if __name__ == "__main__":
    main()
