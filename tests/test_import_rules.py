"""Who may import whom, read off the syntax tree.

The source must keep every rule, and every rule must catch a file that breaks it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGE, SOURCE, Module, make_package, read_modules

# Anyone may import these; they import nothing of ours but each other.
FOUNDATION = (
    *("checksums", "errors", "files", "messages", "own_parts", "redaction", "stop_signals"),
    *("__version__", "PYTHON", "TORCH"),
)

SHARED_BY_ENGINES = (
    *("engines.base", "engines.settings", "engines.steps", "engines.masters", "engines.spread"),
    *("engines.ranks", "engines.scoring", "engines.checkpoint_folder", "engines.digests"),
    *("engines.async_save", "engines.xla", "engines.adapters", "engines.greedy"),
)

# Importer -> imported, beside itself and the foundation. The longest prefix of a module's name counts.
ROOMS: dict[str, tuple[str, ...]] = {
    "checksums": (),
    "errors": (),
    "messages": (),
    "files": (),
    "own_parts": (),
    "redaction": (),
    "stop_signals": (),
    "batch": (),
    "record_ids": (),
    "named_tensors": (),
    "losses": ("batch", "config.alignment", "config.dpo_forms", "config.fields"),
    "ops": ("batch",),
    "models": (),
    "config": (),
    "data": ("batch", "config", "record_ids"),
    "engines.base": ("batch", "named_tensors"),
    "engines.ranks": ("engines.base",),
    "engines.steps": ("engines.base", "engines.ranks", "batch"),
    "engines.settings": (),
    "engines.masters": (),
    "engines.adapters": ("engines.steps", "engines.xla", "models", "batch"),
    "engines.scoring": (
        *("engines.base", "engines.ranks", "engines.settings", "engines.steps"),
        *("models", "ops", "batch"),
    ),
    "engines.spread": (
        *("engines.base", "engines.masters", "engines.ranks", "engines.steps", "engines.xla"),
        *("engines.greedy", "batch"),
    ),
    "engines.greedy": ("batch",),
    "engines.digests": (),
    "engines.checkpoint_folder": ("engines.base", "engines.digests", "engines.ranks", "named_tensors"),
    "engines.async_save": ("engines.ranks", "engines.checkpoint_folder"),
    "engines.xla": ("engines.base", "batch"),
    "engines.native": (*SHARED_BY_ENGINES, "models", "ops", "batch", "config"),
    "engines.native.checkpoint": ("engines", "models", "ops", "batch", "config", "named_tensors"),
    "engines.nxd": (*SHARED_BY_ENGINES, "models", "ops", "batch", "config"),
    "reference": ("engines.base", "batch", "record_ids"),
    "training": ("engines.base", "losses", "batch", "config", "neuron.monitor"),
    "training.hooks": ("training", "engines.base", "losses", "batch", "config", "reference"),
    "weights": (
        *("models.sharding", "models.presets", "models.partition", "models.families", "models.backend"),
        "models.adapters",
        "named_tensors",
    ),
    "neuron": ("config",),
    "planning": ("models", "ops", "data", "config"),
    # Builds no engine: it is handed what gives log-probabilities or tokens.
    "evaluation": ("batch", "models", "data", "ops", "weights", "config", "planning"),
    "run": (
        *("batch", "named_tensors", "losses", "ops", "models", "config", "data", "engines", "planning"),
        *("reference", "training", "weights", "neuron", "evaluation"),
    ),
    "cli": (
        *("run", "config", "cli_conversion", "cli_doctor", "cli_evaluation", "cli_reference", "cli_sweep"),
        *("cli_parser", "cli_process", "neuron.environment", "neuron.compile", "neuron.node"),
    ),
    "cli_parser": ("cli_conversion", "cli_doctor", "cli_evaluation", "cli_reference", "cli_sweep"),
    "cli_process": ("run", "config", "neuron.environment"),
    "cli_conversion": (),
    "cli_doctor": ("run", "config", "neuron.bundle"),
    "cli_evaluation": ("run",),
    "cli_reference": ("run", "config", "reference"),
    "cli_sweep": ("run", "config"),
    "api": ("cli_process", "config", "losses", "run"),
    "__main__": ("cli", "cli_process"),
    "": ("api", "losses", "run"),
}

# The only libraries beside the standard one that a room may import.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "checksums": (),
    "errors": (),
    "messages": ("tqdm",),
    "files": (),
    "own_parts": (),
    "redaction": (),
    "stop_signals": (),
    "batch": ("torch",),
    "record_ids": ("numpy",),
    "named_tensors": ("torch",),
    "losses": ("torch",),
    "ops": ("torch",),
    "models": ("torch",),
    "models.backend": ("torch", "transformers"),
    "models.nf4": ("torch", "bitsandbytes"),
    "engines.base": ("torch",),
    "engines.steps": ("torch",),
    "engines.scoring": ("torch",),
    "engines.spread": ("torch",),
    "engines.settings": ("torch",),
    "engines.masters": ("torch",),
    "config": ("omegaconf", "hydra"),
    "cli": (),
    "cli_conversion": (),
    "cli_doctor": (),
    "cli_evaluation": (),
    "cli_parser": (),
    "cli_process": (),
    "cli_reference": (),
    "cli_sweep": (),
    "neuron.bundle": (),
    "neuron.compile": (),
    "neuron.environment": (),
    "neuron.monitor": (),
    "neuron.node": (),
    "neuron.report": (),
}

# Library -> the only places that may import it.
RESERVED: dict[str, tuple[str, ...]] = {
    "lightning": ("training", "data.module", "run", "api"),
    "pytorch_lightning": (),
    "nemo": ("training",),
    "nki": (),
    "nkilib": (),
    "bitsandbytes": ("models.nf4",),
    "torch_xla": ("engines.nxd", "engines.xla", "neuron.compile"),
    "torch_neuronx": ("engines.nxd", "engines.xla", "neuron.compile"),
    "neuronx_distributed": ("engines.nxd", "neuron.compile"),
    "neuronxcc": ("engines.nxd", "neuron.compile"),
    "libneuronxla": ("engines.nxd", "neuron.compile"),
    "torch.distributed": ("engines.ranks", "engines.native", "engines.nxd", "training", "run"),
}

# data.token_parts reads none: it sets the one switch that the tokenizers library has for forked processes.
ENVIRONMENT_READERS = ("cli", "cli_process", "engines.nxd.compat", "data.token_parts")
ENVIRONMENT_NAMES = ("environ", "environb", "getenv", "getenvb", "putenv")


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def entry_of(name: str, table: dict[str, tuple[str, ...]]) -> str | None:
    """The longest key of `table` that `name` is under."""
    matches = [key for key in table if name == key or (key and name.startswith(f"{key}."))]
    return max(matches, key=len, default=None)


def broken_arrows(module: Module) -> Iterator[str]:
    room = entry_of(module.name, ROOMS)
    if room is None:
        # The __init__ of a folder that only holds rooms, as engines, must stay empty.
        holds_rooms = any(key.startswith(f"{module.name}.") for key in ROOMS)
        if not holds_rooms or list(module.imports()):
            yield f"{module.name} is in no room that ROOMS lists"
        return
    allowed = (*ROOMS[room], *FOUNDATION, *([room] if room else []))
    for imported in module.imports():
        package, _, ours = imported.partition(".")
        if package == PACKAGE and not is_under(ours, allowed):
            yield f"{module.name} imports {ours or PACKAGE}"


def broken_libraries(module: Module) -> Iterator[str]:
    room = entry_of(module.name, LIBRARIES)
    for imported in module.imports():
        library = imported.partition(".")[0]
        is_foreign = library not in (*sys.stdlib_module_names, PACKAGE)
        if room is not None and is_foreign and library not in LIBRARIES[room]:
            yield f"{module.name} imports the library {library}"
        for reserved, places in RESERVED.items():
            if is_under(imported, (reserved,)) and not is_under(module.name, places):
                yield f"{module.name} imports the library {reserved}"


def broken_attributes(module: Module) -> Iterator[str]:
    """Environment variables and process groups reached without an import of their own."""
    may_read = is_under(module.name, ENVIRONMENT_READERS)
    may_group = is_under(module.name, RESERVED["torch.distributed"])
    for node in ast.walk(module.tree):
        dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if not may_read and dotted in [f"os.{name}" for name in ENVIRONMENT_NAMES]:
            yield f"{module.name} reads {dotted}"
        if not may_group and dotted == "torch.distributed":
            yield f"{module.name} uses {dotted}"
    for imported in module.imports():
        if not may_read and imported in [f"os.{name}" for name in ENVIRONMENT_NAMES]:
            yield f"{module.name} reads {imported}"


def broken_rules(modules: list[Module]) -> list[str]:
    rules = (broken_arrows, broken_libraries, broken_attributes)
    return [fault for module in modules for rule in rules for fault in rule(module)]


def cycles(modules: list[Module]) -> list[str]:
    """Rooms that reach themselves over others; folders count as one room, `engines.base` as another."""
    rooms = {key.removesuffix(".checkpoint").removesuffix(".hooks") for key in ROOMS}
    table: dict[str, tuple[str, ...]] = dict.fromkeys(rooms, ())
    edges: dict[str, set[str]] = {}
    for module in modules:
        here = entry_of(module.name, table)
        for imported in module.imports():
            package, _, ours = imported.partition(".")
            there = entry_of(ours, table)
            if package == PACKAGE and here and there and here != there:
                edges.setdefault(here, set()).add(there)
    return [room for room in sorted(edges) if room in reachable(room, edges)]


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for room in edges.get(waiting.pop(), set()) - seen:
            seen.add(room)
            waiting.append(room)
    return seen


def test_source_keeps_the_rules() -> None:
    modules = read_modules(SOURCE)
    assert "batch" in {module.name for module in modules}
    assert broken_rules(modules) == []


def test_no_cycle_between_rooms() -> None:
    assert cycles(read_modules(SOURCE)) == []


LAWBREAKERS = [
    ("losses/dpo.py", "from nxdt_align.models.decoder import Decoder", "imports models.decoder.Decoder"),
    ("losses/dpo.py", "from nxdt_align.config.schema import Config", "imports config.schema.Config"),
    ("losses/dpo.py", "def f():\n    import numpy", "imports the library numpy"),
    ("models/decoder.py", "from torch import distributed", "imports the library torch.distributed"),
    ("models/decoder.py", "import torch\ntorch.distributed.barrier()", "uses torch.distributed"),
    ("models/decoder.py", "from ..ops import attention", "imports ops.attention"),
    ("models/__init__.py", "from ..batch import Batch", "imports batch.Batch"),
    ("config/load.py", "import yaml", "imports the library yaml"),
    ("data/packing.py", "import lightning.pytorch", "imports the library lightning"),
    ("data/module.py", "import nxdt_align.engines.base", "imports engines.base"),
    ("data/module.py", "from nxdt_align.planning import rows", "imports planning.rows"),
    ("engines/native/e.py", "from nxdt_align.engines.nxd import layers", "imports engines.nxd.layers"),
    ("engines/native/e.py", "import torch_xla.core", "imports the library torch_xla"),
    ("engines/native/e.py", "import nxdt_align.weights.names", "imports weights.names"),
    ("engines/__init__.py", "from .base import Engine", "is in no room that ROOMS lists"),
    ("evaluation/generate.py", "from nxdt_align.engines.base import Engine", "imports engines.base.Engine"),
    ("extra/x.py", "", "is in no room that ROOMS lists"),
    ("reference/cache.py", "import torch.distributed", "imports the library torch.distributed"),
    ("training/module.py", "from nxdt_align.reference import cache", "imports reference.cache"),
    ("training/module.py", "from nxdt_align import run", "imports run"),
    ("weights/hf.py", "from nxdt_align.models import decoder", "imports models.decoder"),
    ("neuron/monitor.py", "import torch", "imports the library torch"),
    ("neuron/environment.py", "import torch", "imports the library torch"),
    ("neuron/environment.py", "import os\nos.environ['A']", "reads os.environ"),
    ("cli.py", "from nxdt_align.neuron import monitor", "imports neuron.monitor"),
    ("errors.py", "from nxdt_align.batch import Batch", "imports batch.Batch"),
    ("run.py", "import os\nos.environ['A']", "reads os.environ"),
    ("run.py", "from os import getenv", "reads os.getenv"),
    ("run.py", "import nemo.utils", "imports the library nemo"),
]


@pytest.mark.parametrize(("file", "text", "fault"), LAWBREAKERS)
def test_each_rule_catches_a_file_that_breaks_it(tmp_path: Path, file: str, text: str, fault: str) -> None:
    module, *_ = modules = make_package(tmp_path, {file: text})
    assert broken_rules(modules) == [f"{module.name} {fault}"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cli.py", "import os\nos.environ['A']\nfrom nxdt_align import __version__, run"),
        ("engines/nxd/compat.py", "import os, torch_xla\nos.environ['A']"),
        ("engines/native/checkpoint.py", "import nxdt_align.named_tensors\nfrom . import engine"),
        ("training/hooks.py", "from nxdt_align.reference.cache import ReferenceStore"),
        ("run.py", "import torch\ntorch.load(p, weights_only=True)"),
        ("engines/__init__.py", "from __future__ import annotations"),
    ],
)
def test_what_the_design_allows_is_no_fault(tmp_path: Path, file: str, text: str) -> None:
    assert broken_rules(make_package(tmp_path, {file: text})) == []


def test_a_cycle_is_found(tmp_path: Path) -> None:
    files = {"data/a.py": "from nxdt_align.config import x", "config/b.py": "from nxdt_align.data import y"}
    assert cycles(make_package(tmp_path, files)) == ["config", "data"]


def test_command_line_starts_without_heavy_libraries() -> None:
    """`--help` and the config commands must answer in under 2 seconds; torch alone takes as long."""
    heavy = ("torch", "transformers", "datasets", "lightning", "nemo", "pandas", "pyarrow", "numpy")
    code = f"import sys, {PACKAGE}.cli; print(*[name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SOURCE.parent)
    assert done.stdout.split() == []
