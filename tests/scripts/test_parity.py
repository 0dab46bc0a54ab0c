"""examples/parity.sh with a recorder in the interpreter's place: which two runs it compares."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from train_sh_fixture import write_script

# Answers which device torch finds, where the package is, and the number of processes; writes down the rest.
RECORDER = """#!/bin/sh
case "$*" in
  *current_accelerator*) echo "$FAKE_DEVICE" ;;
  -c*) echo {package} ;;
  "-m nxdt_align processes "*) echo 1 ;;
  *) echo "$*" >>{calls} ;;
esac
"""
Parity = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


@pytest.fixture
def parity(repo: Path, tmp_path: Path) -> Parity:
    calls = tmp_path / "calls"
    python = write_script(
        tmp_path / "recorder", RECORDER.format(package=repo / "src" / "nxdt_align", calls=calls)
    )
    own = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NXDT_ALIGN_PYTHON": str(python)}

    def start(*overrides: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        done = subprocess.run(
            [str(repo / "examples" / "parity.sh"), *overrides],
            cwd=tmp_path,
            env={**own, "CONF_FILE": "hf_llama3_8B_DPO_config", **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return start


def test_without_an_accelerator_there_is_no_twin(parity: Parity) -> None:
    """CPU against CPU would say ok of a device that nothing ran on."""
    done, calls = parity(FAKE_DEVICE="")
    assert done.returncode == 1 and calls == []
    assert "torch finds no accelerator here: TWIN=neuron says why, TWIN=cpu compares" in done.stderr
    done, calls = parity(FAKE_DEVICE="", TWIN="cpu")
    assert done.returncode == 0, done.stderr
    assert ["trainer.accelerator=cpu" in call.split() for call in calls] == [True, True, False]


def test_the_twin_is_told_its_device_and_what_is_its_own(parity: Parity) -> None:
    """By name, so that it stops where the device is not there."""
    own = "data.attention=nki a=[1,2]"
    done, calls = parity("data.packing=packed", FAKE_DEVICE="neuron", TWIN_OVERRIDES=own)
    assert done.returncode == 0, done.stderr
    first, second, compared = (call.split() for call in calls)
    assert "data.packing=packed" in first and "data.packing=packed" in second
    assert "trainer.accelerator=cpu" in first and "trainer.accelerator=neuron" in second
    assert "data.attention=nki" not in first and second[-2:] == own.split()
    assert [Path(word).name for word in compared[-2:]] == ["cpu", "twin"]
    assert "on cpu against neuron" in done.stdout
