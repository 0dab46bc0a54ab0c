"""Nothing in the source may run code out of a file or a string, or swallow every error."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import SOURCE, Module, make_package, read_modules

FORBIDDEN_CALLS = ("yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system", "os.popen")
# What torch.load raises on a damaged file.
HARMLESS_PICKLE = ("pickle.UnpicklingError", "pickle.PickleError")


def faults(module: Module) -> Iterator[str]:
    yield from pickle_uses(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield from unsafe_call(node)
        elif isinstance(node, ast.ExceptHandler) and swallows_all(node):
            yield f"line {node.lineno} swallows every error"


def pickle_uses(module: Module) -> Iterator[str]:
    """Every use of pickle but its errors and an Unpickler that decides itself what it accepts."""
    restricted = {
        base
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        and "find_class" in [getattr(part, "name", "") for part in node.body]
        for base in node.bases
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            yield f"line {node.lineno} imports from pickle"
        elif isinstance(node, ast.Attribute) and node not in restricted:
            dotted = ast.unparse(node)
            if dotted.startswith("pickle.") and dotted not in HARMLESS_PICKLE:
                yield f"line {node.lineno} uses {dotted}"


def unsafe_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called == "torch.load" and keywords.get("weights_only") != "True":
        yield f"line {node.lineno} calls torch.load without weights_only=True"
    if called in FORBIDDEN_CALLS:
        yield f"line {node.lineno} calls {called}"
    if keywords.get("shell") == "True":
        yield f"line {node.lineno} runs a shell string"


def swallows_all(node: ast.ExceptHandler) -> bool:
    catches_all = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
    return catches_all and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))


def test_source_has_no_fault() -> None:
    assert [f"{module.name}, {fault}" for module in read_modules(SOURCE) for fault in faults(module)] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("from pickle import loads", "line 1 imports from pickle"),
        ("import pickle\npickle.load(f)", "line 2 uses pickle.load"),
        ("import pickle\nclass U(pickle.Unpickler): pass", "line 2 uses pickle.Unpickler"),
        ("torch.load(p)", "line 1 calls torch.load without weights_only=True"),
        ("torch.load(p, weights_only=False)", "line 1 calls torch.load without weights_only=True"),
        ("yaml.load(f)", "line 1 calls yaml.load"),
        ("eval(text)", "line 1 calls eval"),
        ("subprocess.run(c, shell=True)", "line 1 runs a shell string"),
        ("try:\n    f()\nexcept Exception:\n    pass", "line 3 swallows every error"),
        ("try:\n    f()\nexcept:\n    pass", "line 3 swallows every error"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, text: str, fault: str) -> None:
    (module,) = make_package(tmp_path, {"build.py": text})
    assert list(faults(module)) == [fault]


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(p, weights_only=True)",
        "yaml.safe_load(f)",
        "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass",
        "import pickle\nclass U(pickle.Unpickler):\n    def find_class(self, module, name): ...",
        "try:\n    f()\nexcept BaseException:\n    clean_up()\n    raise",
        "model.eval()",
    ],
)
def test_what_is_safe_is_no_fault(tmp_path: Path, text: str) -> None:
    (module,) = make_package(tmp_path, {"build.py": text})
    assert list(faults(module)) == []
