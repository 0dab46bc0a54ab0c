"""The command line where torch loads TorchNeuron by itself, and that does not load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nxdt_align import cli
from nxdt_align.cli_process import require_torch
from nxdt_align.errors import UserError

RELEASE = ".".join(torch.__version__.split(".")[:2])
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """TorchNeuron as pip installs it, of a torch's version, whose import fails."""
    monkeypatch.setattr("nxdt_align.config.neuron_packages.TORCH_NEURON_PYTHON", (3, 0))
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    monkeypatch.delenv("NXDT_ALIGN_DEBUG", raising=False)

    def of(release: str, *modules: str) -> None:
        info = tmp_path / f"torch_neuronx-{release}.3.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch-neuronx\nVersion: {release}.3.0.1\n"
        )
        (info / "entry_points.txt").write_text("[torch.backends]\ntorch_neuronx = torch_neuronx:autoload\n")
        (tmp_path / "torch_neuronx.py").write_text("raise ImportError('libnrt.so.1: cannot open\\nit')\n")
        for module in modules:
            (tmp_path / f"{module}.py").touch()
        monkeypatch.syspath_prepend(tmp_path)

    return of


@pytest.mark.parametrize("verb", ["plan", "train", "workers", "sweep"])
def test_packages_that_do_not_fit_are_told_before_torch_is_imported(
    verb: str, install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("2.99")
    monkeypatch.setitem(cli._VERBS, verb, lambda *_: pytest.fail("torch would be imported"))
    arguments = ["torchrun"] if verb == "workers" else ["--config-name", "dpo"]
    assert cli.main([verb, *arguments, *(["data.seq_length=1,2"] if verb == "sweep" else [])]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: torch would not load TorchNeuron: torch-neuronx 2.99.3.0.1 goes with ")
    assert "AUTOLOAD=0 with trainer.accelerator=cpu runs without it\n" in said


def test_what_torch_does_not_load_may_be_as_it_is(install: Install) -> None:
    install(RELEASE)
    with pytest.raises(UserError, match="would not load TorchNeuron: TorchNeuron imports the package nki"):
        require_torch({})
    require_torch({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    require_torch({}, loads=False)


def test_doctor_looks_at_what_does_not_fit(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("2.99")
    monkeypatch.setitem(cli._VERBS, "doctor", lambda *_: 0)
    assert [cli.main(["doctor", *option, "--config-name", "dpo"]) for option in (["--neuron"], [])] == [0, 1]


def test_a_torch_neuron_that_fits_and_does_not_load(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own error, as ``import torch`` raises it."""
    install(RELEASE, "nki")
    monkeypatch.setitem(cli._VERBS, "plan", lambda *_: torch._import_device_backends())
    assert cli.main(["plan", "--config-name", "dpo"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: Failed to load the backend extension: torch_neuronx. ")
    assert said.endswith(" The reason: libnrt.so.1: cannot open it\n")
    monkeypatch.setenv("NXDT_ALIGN_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli.main(["plan", "--config-name", "dpo"])
