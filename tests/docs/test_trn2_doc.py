"""docs/trn2.md: its configurations load for engine native, and its plan is one."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from nxdt_align.cli import main
from nxdt_align.config.check import with_check
from nxdt_align.config.load import read_config

DOC = Path(__file__).resolve().parents[2] / "docs" / "trn2.md"
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", DOC.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
SCRIPTS = [command for command in COMMANDS if "examples/" in command]


@pytest.mark.parametrize("command", SCRIPTS)
def test_the_configuration_loads(command: str, repo: Path) -> None:
    """With faults of files alone that are not on this machine."""
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    (script,) = [word for word in words if word.startswith("examples/")]
    assert os.access(repo / script, os.X_OK)
    overrides = words[words.index(script) + 1 :]
    config, faults = read_config(variables["CONF_FILE"], overrides, repo / "conf")
    faults = with_check(config, faults, engine="native")
    assert [str(fault) for fault in faults if not fault.is_missing_path] == []


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) == 3


def test_the_plan_compares_with_both_chips(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("nxdt-align plan")]
    assert main(shlex.split(command)[1:]) == 0
    said = capsys.readouterr().out
    assert "of 24 GiB (trn2, lnc 2" in said and "of 36 GiB (trn3, lnc 2" in said


def test_a_plan_made_on_trn2_is_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without words on engine and device; rows, masters and limits are native's on a NeuronCore."""
    (command,) = [command for command in COMMANDS if command.startswith("nxdt-align plan")]
    named = [*shlex.split(command)[1:], "precision.type=bf16SR"]
    assert main(named) == 0
    wanted = capsys.readouterr().out
    left_out = ("trainer.accelerator=", "trainer.lnc=", "distributed_strategy.engine=")
    monkeypatch.setattr("nxdt_align.config.engines.neuron_stack", lambda: "native")
    assert main([word for word in named if not word.startswith(left_out)]) == 0
    assert capsys.readouterr().out == wanted
