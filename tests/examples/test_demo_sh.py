"""examples/demo.sh, with a recorder in the interpreter's place: its steps, their order, where they write."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demo.models import MODELS
from omegaconf import OmegaConf

# Stands for python: writes every call down; "train" leaves the folders that a run leaves.
RECORDER = """#!{python}
import json, os, sys
from pathlib import Path
if sys.argv[1] == "-c":
    sys.exit(print({package!r}))
with open({calls!r}, "a") as file:
    call = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "demo": os.environ.get("NXDT_DEMO_DIR")}}
    file.write(json.dumps(call) + "\\n")
if "processes" in sys.argv:
    print(1)
if "train" in sys.argv:
    name = sys.argv[sys.argv.index("--config-name") + 1].removesuffix("_config")
    name = name.replace("llama", os.environ["NXDT_DEMO_MODEL"])
    for date in ("2025-01-01_00-00-00", "2025-01-02_00-00-00"):
        Path("nemo_experiments", name, date, "hf_export").mkdir(parents=True)
    sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""


def run_demo(
    repo: Path, folder: Path, *arguments: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    python, calls = folder / "python", folder / "calls"
    package = str(repo / "src" / "nxdt_align")
    python.write_text(RECORDER.format(python=sys.executable, calls=str(calls), package=package))
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "NXDT_ALIGN_PYTHON": str(python), **variables}
    command = [str(repo / "examples" / "demo.sh"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done, [json.loads(line) for line in lines]


@pytest.mark.parametrize(("objective", "model"), [("dpo", "llama"), ("orpo", "llama"), ("dpo", "qwen3")])
def test_steps(repo: Path, tmp_path: Path, objective: str, model: str) -> None:
    done, calls = run_demo(repo, tmp_path, objective, *([] if model == "llama" else [model]))
    assert done.returncode == 0, done.stderr
    assert {call["cwd"] for call in calls} == {call["demo"] for call in calls} == {str(tmp_path / "demo_run")}
    prepare, *training, report = [" ".join(map(str, call["argv"])) for call in calls]
    assert prepare == f"-m demo.prepare --out . --model {model}"
    trained = [line for line in training if "nxdt_align train" in line]
    align = f"tiny_llama_{objective.upper()}"
    assert [line.split("--config-name ")[1].split()[0] for line in trained] == [
        "tiny_llama_SFT_config",
        f"{align}_config",
    ]
    newest = f"nemo_experiments/tiny_{model}_{objective.upper()}/2025-01-02_00-00-00"
    assert report == (
        f"-m demo.report --before warmup --after {newest}/hf_export --data data"
        f" --objective {objective} --model {model} --tensorboard {newest} --checkpoint {newest}/checkpoints"
    )


def test_lora_trains_adapters_of_the_same_warm_up(repo: Path, tmp_path: Path) -> None:
    done, calls = run_demo(repo, tmp_path, "dpo", "", "lora")
    assert done.returncode == 0, done.stderr
    trained = [call["argv"] for call in calls if "train" in call["argv"]]
    warm_up, aligned = [[a for a in argv if "peft" in a or "optim" in a] for argv in trained]
    assert not warm_up
    assert "model_alignment_strategy.peft.target_modules=[all-linear]" in aligned
    assert "model.optim.lr=1e-4" in aligned
    done, _ = run_demo(repo, tmp_path, "dpo", "llama", "prefix")
    assert done.returncode == 1 and "PEFT must be lora" in done.stderr


@pytest.mark.full
def test_lora_gains_what_training_every_weight_does(repo: Path, tmp_path: Path) -> None:
    """``make demo PEFT=lora``, whole. Training every weight was seen at 1.000 and 90.6%, adapters at 1.000
    and 89.4%. On a base in 4 bits the loss after the same steps is that of adapters on the whole one to 2%
    (seen: 0.6%)."""
    environment = os.environ | {"NXDT_ALIGN_PYTHON": sys.executable}
    command = [str(repo / "examples" / "demo.sh"), "dpo", "llama", "lora"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    after = {
        name: float(re.search(rf"^{name} .* ([\d.]+)%?$", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("reward accuracy", "right completions")
    }
    assert after["reward accuracy"] >= 0.95
    assert after["right completions"] >= 80
    pytest.importorskip("bitsandbytes")
    demo, peft = tmp_path / "demo_run", "model_alignment_strategy.peft"
    command = [sys.executable, "-m", "nxdt_align", "train", "--config-path", str(repo / "conf")]
    command += ["--config-name", "tiny_llama_DPO_config", f"{peft}.target_modules=[all-linear]"]
    command += [f"{peft}.rank=16", f"{peft}.alpha=32", f"{peft}.dropout=0", "model.optim.lr=1e-4"]
    environment |= {"NXDT_DEMO_DIR": str(demo), "PYTHONPATH": str(repo / "src")}
    command += [f"{peft}.quantize_base=nf4", "exp_manager.name=quantised"]
    done = subprocess.run(command, cwd=demo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [last_val_loss(demo / "nemo_experiments" / name) for name in ("tiny_llama_DPO", "quantised")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def last_val_loss(experiment: Path) -> float:
    (metrics,) = experiment.glob("*/metrics.jsonl")
    rows = map(json.loads, metrics.read_text().splitlines())
    return [float(row["val_loss"]) for row in rows if "val_loss" in row][-1]


def test_alignment_starts_from_the_newest_warm_up(repo: Path, tmp_path: Path) -> None:
    run_demo(repo, tmp_path)
    warm_up = (tmp_path / "demo_run" / "warmup").resolve()
    assert warm_up == tmp_path / "demo_run/nemo_experiments/tiny_llama_SFT/2025-01-02_00-00-00/hf_export"
    assert warm_up.is_dir()


def test_second_run_starts_afresh(repo: Path, tmp_path: Path) -> None:
    run_demo(repo, tmp_path)
    (tmp_path / "demo_run" / "leftover").touch()
    done, _ = run_demo(repo, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "demo_run" / "leftover").exists()


def test_failed_training_ends_it(repo: Path, tmp_path: Path) -> None:
    done, calls = run_demo(repo, tmp_path, FAKE_STATUS="1")
    assert done.returncode == 1
    assert "demo.report" not in json.dumps(calls)


def test_unknown_objective_is_refused(repo: Path, tmp_path: Path) -> None:
    done, calls = run_demo(repo, tmp_path, "ppo")
    assert done.returncode == 1
    assert "not 'ppo'" in done.stderr
    assert calls == []
    assert not (tmp_path / "demo_run").exists()


def test_every_family_is_known_to_both(repo: Path, tmp_path: Path) -> None:
    for model in MODELS:
        done, _ = run_demo(repo, tmp_path, "dpo", model, FAKE_STATUS="1")
        assert "MODEL must be" not in done.stderr
    done, calls = run_demo(repo, tmp_path, "dpo", "bert")
    assert done.returncode == 1 and "but is 'bert'" in done.stderr
    assert all("bert" not in json.dumps(call) for call in calls)


@pytest.mark.parametrize("objective", ["SFT", "DPO", "ORPO"])
def test_experiment_is_named_after_its_config(
    repo: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo finds a run's folder by this name."""
    monkeypatch.delenv("NXDT_DEMO_MODEL", raising=False)
    config = OmegaConf.load(repo / "conf" / f"tiny_llama_{objective}_config.yaml")
    assert config.name == f"tiny_llama_{objective}"
    assert config.exp_manager.get("name") in (None, config.name)
