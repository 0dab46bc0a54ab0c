"""The archive of ``nxdt-align doctor --neuron``: what is in it, and what is not."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import tarfile
from pathlib import Path

import pytest
from nki_flash import FlashConfig, StandIn

from nxdt_align.cli import main
from nxdt_align.engines.nxd.flash import NkiKernels
from nxdt_align.engines.nxd.flash_check import Difference, differences
from nxdt_align.redaction import scrub

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUv",
    "NEURON_DEPLOY_PASSWORD": "swordfish",
}


def unpacked(archive: Path) -> dict[str, str]:
    with tarfile.open(archive, "r:gz") as opened:
        found = {}
        for member in opened.getmembers():
            file = opened.extractfile(member)
            assert file is not None and member.isreg() and not member.name.startswith(("/", ".."))
            found[member.name.partition("/")[2]] = io.TextIOWrapper(file, "utf-8").read()
    return found


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with Neuron's tools and secrets in its environment, a run, and a log."""
    tools = tmp_path / "tools"
    tool(tools, "neuron-ls", 'echo \'[{"neuron_device": 0, "nc_count": 2}]\'')
    tool(tools, "neuron-monitor", "while :; do echo '{\"period\": 5}'; sleep 0.1; done")
    tool(tools, "neuronx-cc", "echo 'no license' >&2; exit 3")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name, value in {**SECRETS, "NEURON_RT_EXEC_TIMEOUT": "600", "DATABASE": "postgres://me"}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "runs" / "2026-11-29"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "weights.json").write_text("{}")
    (run / "events.out.tfevents.1").write_bytes(b"\0")
    (run / "config.yaml").write_text("wandb: {api_key: 0123456789abcdef0123}\nsteps: 3\n")
    (run / "run.log").write_text("x" * 250_000 + "\nlogin with swordfish\nerror: device 3 is lost\n")
    return run


def test_what_is_in_the_archive(node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("fetched https://me:hunter22@host/x, Authorization: Bearer abcdef.123456\n")
    out = tmp_path / "out" / "for_you.tar.gz"
    assert main(["doctor", "--neuron", "--run", str(node), "--log", str(log), "--out", str(out)]) == 0
    assert f"{out}: " in capsys.readouterr().out
    found = unpacked(out)
    versions = json.loads(found["versions.json"])
    assert versions["torch"] is not None and versions["torch-neuronx"] is None
    assert "NEURON_RT_EXEC_TIMEOUT=600\n" in found["environment.txt"]
    assert "NEURON_DEPLOY_PASSWORD=<NEURON_DEPLOY_PASSWORD>" in found["environment.txt"]
    # Variables that are none of the stack's nor a launcher's are left out, whatever they are.
    assert "DATABASE" not in found["environment.txt"] and "WANDB" not in found["environment.txt"]
    assert json.loads(found["node/neuron-ls.json"]) == [{"neuron_device": 0, "nc_count": 2}]
    assert json.loads(found["node/neuron-monitor.json"]) == {"period": 5}
    assert found["node/neuronx-cc.txt"] == "no license\n\n[status 3]\n"
    assert "Max open files" in found["node/limits.txt"] and " / " in found["node/mountinfo.txt"]
    run_log = found["runs/2026-11-29/run.log"]
    assert run_log.startswith("[the last 200,000 of 250,") and run_log.endswith("error: device 3 is lost\n")
    assert "steps: 3" in found["runs/2026-11-29/config.yaml"]
    assert not any("checkpoints" in name or "tfevents" in name for name in found)
    everything = "\n".join(found.values())
    for secret in (*SECRETS.values(), "hunter22", "abcdef.123456"):
        assert secret not in everything


def test_a_configuration_with_its_plan_and_manifest(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's fault stands where the plan would, as it may be why the archive is asked for."""
    monkeypatch.chdir(tmp_path)
    manifest = tmp_path / "runs" / "compile" / "hf_llama_dpo.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"graphs": []}')
    given = ("exp_manager.exp_dir=runs", "exp_manager.name=hf_llama", "data.train_dir=/nowhere.jsonl")
    arguments = ["--config-path", str(repo / "conf"), "--config-name", "hf_llama3_8B_DPO_config", *given]
    assert main(["doctor", "--neuron", *arguments]) == 0
    found = unpacked(tmp_path / "nxdt-align-doctor.tar.gz")
    assert "exp_dir: runs" in found["config.yaml"] and found["files/0_hf_llama_dpo.json"] == '{"graphs": []}'
    assert "Error: " in found["plan.txt"]


def test_a_kernel_that_fails_is_told_after_the_archive_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "neuronxcc", None)
    out = tmp_path / "core.tar.gz"
    assert main(["doctor", "--neuron", "--flash", "--out", str(out)]) == 1
    assert "error: doctor --flash: model.fusions.flash_attention: no NKI kernel" in capsys.readouterr().err
    assert "no NKI kernel" in unpacked(out)["flash.txt"]


def test_a_kernel_of_another_signature_is_in_the_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_version() -> list[str]:
        raise TypeError("flash_fwd() got an unexpected keyword argument 'logit_bias'")

    monkeypatch.setattr("nxdt_align.run.neuron_check.flash_lines", other_version)
    out = tmp_path / "sent.tar.gz"
    assert main(["doctor", "--neuron", "--flash", "--out", str(out)]) == 1
    assert "error: doctor --flash: TypeError: flash_fwd() got an" in capsys.readouterr().err
    assert "Traceback" in unpacked(out)["flash.txt"] and "other_version" in unpacked(out)["flash.txt"]


def test_what_looks_secret_is_hidden_and_nothing_else() -> None:
    kept = "max_tokens: 512, tokenizer: llama, use_auth_token: False, key: ${oc.env:HF_TOKEN}, pass: 12.5"
    assert scrub(kept) == kept
    for text in ('"api_key": "abcd1234"', "password=hunter22", "AWS AKIAABCDEFGHIJKLMNOP", "s3://a:bcde@h"):
        said = scrub(text)
        assert "<hidden>" in said
        assert not any(secret in said for secret in ("abcd1234", "hunter22", "AKIA", "bcde"))


# The kernel beside a dense mask


def kernels(kernel: StandIn) -> NkiKernels:
    return NkiKernels(kernel.flash_fwd, kernel.flash_attn_bwd, FlashConfig, True)


def test_a_kernel_that_is_right_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = differences(kernels(StandIn(rounds=True)), torch.device("cpu"))
    assert len(found) == 12 and all(each.is_right for each in found)
    assert {each.rows for each in found} == {"packed", "shared prompt", "window"}


def test_one_that_ignores_its_bias_is_called_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    class Ignoring(StandIn):
        def _taken(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0 if x.ndim == 4 and x.shape[:2] == (1, 1) else super()._taken(x)

    found = differences(kernels(Ignoring(rounds=True)), torch.device("cpu"))
    assert not all(each.is_right for each in found)
    assert "WRONG" in str(Difference("packed", "values", float("nan")))
