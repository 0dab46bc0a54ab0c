"""docs/first-day-on-trn1.md: its commands are this package's, and their configurations load."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nxdt_align.cli_parser import parse
from nxdt_align.config.check import with_check
from nxdt_align.config.load import read_config

DOC = Path(__file__).resolve().parents[2] / "docs" / "first-day-on-trn1.md"


def commands() -> list[str]:
    (block,) = re.findall(r"^```bash\n(.*?)^```$", DOC.read_text(), re.MULTILINE | re.DOTALL)
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def words(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables that stand before a command, and its words."""
    found = shlex.split(command)
    variables = {}
    while "=" in found[0]:
        name, _, value = found.pop(0).partition("=")
        variables[name] = value
    return variables, found


OF_TRAIN = [command for command in commands() if "examples/train.sh" in command]


def test_there_are_ten_and_each_has_its_line_in_the_table() -> None:
    assert len(commands()) == 10
    assert re.findall(r"^\| (\d+) \|", DOC.read_text(), re.MULTILINE) == [str(n) for n in range(1, 11)]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("nxdt-align")])
def test_the_command_line_takes_it(command: str) -> None:
    arguments = parse(words(command)[1][1:])
    assert arguments.verb in ("plan", "doctor")


@pytest.mark.parametrize("command", OF_TRAIN)
def test_the_configuration_loads(command: str, repo: Path) -> None:
    """With faults of files alone that are not on this machine."""
    variables, (script, *overrides) = words(command)
    assert script == "examples/train.sh" and os.access(repo / script, os.X_OK)
    overrides = [each for each in overrides if each != "--print-env"]
    config, faults = read_config(variables["CONF_FILE"], overrides, repo / "conf")
    faults = with_check(config, faults, engine="nxd")
    assert [str(fault) for fault in faults if not fault.is_missing_path and "neuron" not in str(fault)] == []
    assert (config.world_size, config.distributed_strategy.tensor_model_parallel_size) == (32, 32)


def test_the_environment_is_printed_on_any_machine(repo: Path, tmp_path: Path) -> None:
    (command,) = [command for command in OF_TRAIN if "--print-env" in command]
    done = subprocess.run(
        ["bash", "-euc", f"cd {shlex.quote(str(repo))}; {command}"],
        env={**os.environ, "NXDT_ALIGN_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "--model-type transformer" in done.stdout and "export XLA_DOWNCAST_BF16=0" in done.stdout
    assert "this machine has no NeuronCores" in done.stderr
