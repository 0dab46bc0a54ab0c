"""Runs of the objectives: the demo's data and warm-up, a config an entry, training in a process each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import prepare
from objective_settings import Entry
from omegaconf import OmegaConf

from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
POINTS = 10
"""How often a run is looked at."""
SEED = 1234
SIZES = prepare.Sizes()
RUN = "run"
"""The experiment's folder, beside the config and the output."""


@dataclass(frozen=True)
class Bench:
    """Where everything is, and how long to train."""

    folder: Path
    steps: int
    warmup_steps: int
    threads: int

    @property
    def demo(self) -> Path:
        return self.folder / "demo"

    @property
    def warmup(self) -> Path:
        return self.folder / f"warmup_{self.warmup_steps}"

    @property
    def start(self) -> Path:
        """What every run starts from."""
        return self.warmup / RUN / "hf_export"

    def place(self, entry: Entry) -> Path:
        return self.folder / "runs" / entry.name.replace(" ", "_").replace(",", "")


def make_data(bench: Bench) -> None:
    """The demo's files, and its pairs as unpaired records for KTO: all good ones, then all bad ones."""
    prepare.prepare(bench.demo, SEED, SIZES)
    for split in ("train", "heldout"):
        pairs = [
            json.loads(line) for line in (bench.demo / "data" / f"{split}.jsonl").read_text().splitlines()
        ]
        records = [
            {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
            for key in ("chosen", "rejected")
            for pair in pairs
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        atomic_write(bench.demo / "data" / f"unpaired_{split}.jsonl", text.encode())


def warmup_config(bench: Bench) -> Any:
    config = OmegaConf.load(CONF / "tiny_llama_SFT_config.yaml")
    config.model.optim.sched.warmup_steps = max(1, bench.warmup_steps // 20)
    return with_places(config, bench.warmup, bench.warmup_steps, looks=1)


def config_of(entry: Entry, bench: Bench) -> Any:
    """The demo's DPO config with the entry's objective instead of DPO."""
    config = OmegaConf.load(CONF / "tiny_llama_DPO_config.yaml")
    config.model_alignment_strategy = {entry.objective: {"max_prompt_length": 48, **entry.settings}}
    config.model.optim.lr = entry.lr
    config.model.optim.sched.warmup_steps = max(1, bench.steps // 10)
    config.exp_manager.resume_from_checkpoint = str(bench.start)
    if entry.objective == "kto":
        config.data.global_batch_size *= 2  # completions: as many as its pairs have
        for key, split in (("train_dir", "train"), ("val_dir", "heldout")):
            config.data[key] = str(bench.demo / "data" / f"unpaired_{split}.jsonl")
    return with_places(config, bench.place(entry), bench.steps, POINTS)


def with_places(config: Any, folder: Path, steps: int, looks: int) -> Any:
    """``config`` with so many steps, looked at so often, whose run is in ``folder``."""
    every = max(1, steps // looks)
    config.trainer.max_steps = steps
    config.trainer.val_check_interval = every
    config.trainer.enable_progress_bar = False
    config.exp_manager.explicit_log_dir = str(folder / RUN)
    config.exp_manager.checkpoint_callback_params.update(
        {"filename": "{step}", "every_n_train_steps": every, "save_top_k": -1}
    )
    return config


def train(config: Any, folder: Path, bench: Bench) -> float:
    """Run one config in a process of its own, its folder made afresh; returns wall-clock seconds.

    Start-up, reference pass, validation and export are included. Raises UserError where it fails.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    environment = {
        **os.environ,
        "NXDT_DEMO_DIR": str(bench.demo),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(bench.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-m", "nxdt_align", "train", "--config-name", str(folder / "config.yaml")]
    began = time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        tail = (folder / "output.txt").read_text()[-2000:]
        raise UserError(f"{folder.name} failed with status {done.returncode}:\n{tail}")
    return time.perf_counter() - began
