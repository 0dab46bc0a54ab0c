"""Weights as other tools leave them: the reference DPO implementation's archives, PEFT's adapters."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_fixture import CONFIG, MakeHF, fresh, run, same_folders

from nxdt_align.cli import main
from nxdt_align.errors import UserError
from nxdt_align.run.conversion import describe
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.names import to_hf

METRICS: dict[str, Any] = {"loss/eval": 0.5, "rewards_eval/accuracies": [0.5, 1.0], "examples": 20000}


class Runs:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("ran"), "as code"))


@pytest.fixture
def latest(make_hf: MakeHF, tmp_path: Path) -> Path:
    """LATEST of a run of the reference implementation, and the config.json of its model in ``hf``."""
    make_hf(CONFIG)
    folder = tmp_path / "LATEST"
    folder.mkdir()
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.1)
    save(folder / "policy.pt", {to_hf(name): tensor for name, tensor in fresh(CONFIG).items()})
    save(folder / "optimizer.pt", optimizer.state_dict())
    save(folder / "scheduler.pt", torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict())
    return folder


def save(file: Path, state: Any, metrics: Any = METRICS, **options: Any) -> None:
    torch.save({"step_idx": 20000, "state": state, "metrics": metrics}, file, **options)


METRICS_OF = {
    "none": None,
    "numpy": {"loss": np.float64(0.5), "count": np.int64(3), "rows": [np.float32(1)]},
    "defaultdict": defaultdict(list, {"loss": [0.5]}),
}


@pytest.mark.parametrize("name", ["", "policy.pt"])
def test_a_reference_dpo_archive_converts(latest: Path, name: str, tmp_path: Path) -> None:
    options = {"config": tmp_path / "hf" / "config.json"}
    run(latest / name, tmp_path / "out", to="hf", **options)
    same_folders(tmp_path / "hf", tmp_path / "out")
    run(latest / name, tmp_path / "shards", tp=2, kv_multiplier=1, **options)
    run(tmp_path / "shards", tmp_path / "back")
    same_folders(tmp_path / "hf", tmp_path / "back")
    assert describe(latest / name, options["config"])["parameters"] > 0


@pytest.mark.parametrize("kind", METRICS_OF)
@pytest.mark.parametrize("zipped", [True, False])
def test_metrics_beside_the_weights_are_not_read(
    latest: Path, kind: str, zipped: bool, tmp_path: Path
) -> None:
    if kind != "none" and not zipped:
        pytest.skip("files of torch before 1.6 are read by torch alone, which refuses these")
    state = {to_hf(name): tensor for name, tensor in fresh(CONFIG).items()}
    save(latest / "policy.pt", state, METRICS_OF[kind], _use_new_zipfile_serialization=zipped)
    run(latest / "policy.pt", tmp_path / "out", to="hf", config=tmp_path / "hf" / "config.json")
    same_folders(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("zipped", [True, False])
def test_an_archive_runs_nothing(
    latest: Path, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(latest / "policy.pt", fresh(CONFIG), {"loss": Runs()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"policy.pt is damaged or not a PyTorch file"):
        run(latest, tmp_path / "out", to="hf", config=tmp_path / "hf" / "config.json")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_what_an_archive_lacks_is_said(latest: Path, tmp_path: Path) -> None:
    config = tmp_path / "hf" / "config.json"
    with pytest.raises(WeightsError, match=r"policy.pt has no config.json: give the model's with --config"):
        run(latest, tmp_path / "out", to="hf")
    with pytest.raises(WeightsError, match=f"DPO implementation: nxdt-align convert {latest}/policy.pt"):
        HFFolder(latest, config)  # which training starts from
    for name in ("optimizer.pt", "scheduler.pt"):
        with pytest.raises(WeightsError, match=f"{name} holds the state of an optimizer or a schedule: give"):
            run(latest / name, tmp_path / "out", to="hf", config=config)
    (latest / "policy.pt").unlink()
    with pytest.raises(WeightsError, match="holds no weights"):
        run(latest, tmp_path / "out", to="hf", config=config)
    assert not (tmp_path / "out").exists()


def adapter(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    said = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"])
@pytest.mark.parametrize("verb", ["export", "inspect", "convert"])
def test_an_adapter_is_called_one_with_the_way_out(
    name: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter(tmp_path / "my adapter") / name
    assert main([verb, str(path), *([] if verb == "inspect" else [str(tmp_path / "out")])]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path}/my adapter is a PEFT adapter (LORA, base model meta-llama/Meta-Llama-3-8B)" in message
    assert "base_model_name_or_path" in message


def test_an_adapter_beside_weights_is_not_read_and_said(
    make_hf: MakeHF, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter(make_hf(CONFIG))
    run(tmp_path / "hf", tmp_path / "out", to="hf")
    assert "hf holds a PEFT adapter beside the weights; it is not read" in caplog.text
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config.json of a PEFT adapter cannot be read"):
        run(tmp_path / "hf", tmp_path / "again", to="hf")
