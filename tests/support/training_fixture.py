"""A small run on disk, tokenizer, model shape, pairs and a YAML, for tests through the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rank_processes import run_forked
from small_tokenizers import make_tokenizer

from nxdt_align.cli import main
from nxdt_align.engines.native.checkpoint import NativeCheckpoint

ORPO = ("~model_alignment_strategy.dpo", "model_alignment_strategy.orpo.beta=0.1")
"""Instead of the YAML's DPO."""
TIMES = {"throughput", "throughput_peak"}
WORDS = [
    "the",
    "a",
    "is",
    "of",
    "and",
    "to",
    "in",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "be",
    "at",
    "one",
]


def sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def write_pairs(path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        {
            "prompt": f"{i} {sentence(rng, 1, 12)}",
            "chosen": "the " + sentence(rng, 1, 8),
            "rejected": "a " + sentence(rng, 1, 8),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_labelled(root: Path) -> None:
    """The pairs of ``train.jsonl`` and ``val.jsonl`` as labelled completions, in their place."""
    for name in ("train", "val"):
        path = root / f"{name}.jsonl"
        rows = [
            {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
            for pair in map(json.loads, path.read_text().splitlines())
            for key in ("chosen", "rejected")
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Project:
    """A folder with all that a run needs; ``train`` runs the command line in this process."""

    root: Path

    @classmethod
    def create(cls, root: Path, *, pairs: int = 22) -> Project:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(root / "tokenizer")
        shape = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        (root / "config.json").write_text(json.dumps(shape))
        write_pairs(root / "train.jsonl", pairs, seed=0)
        write_pairs(root / "val.jsonl", 6, seed=1)
        (root / "conf").mkdir()
        (root / "conf" / "run.yaml").write_text(yaml.safe_dump(cls._settings(root)))
        return cls(root)

    @staticmethod
    def _settings(root: Path) -> dict[str, Any]:
        return {
            "name": "run",
            "seed": 7,
            "trainer": {
                "devices": 1,
                "max_steps": 8,
                "log_every_n_steps": 1,
                "val_check_interval": 3,
                "check_val_every_n_epoch": None,
                "gradient_clip_val": 1.0,
                "enable_progress_bar": False,
            },
            "exp_manager": {
                "exp_dir": str(root / "experiments"),
                "resume_if_exists": True,
                "resume_ignore_no_checkpoint": True,
                # They take a second, which hundreds of runs would pay.
                "report": False,
                "check_export": False,
                "checkpoint_callback_params": {
                    "monitor": "step",
                    "mode": "max",
                    "save_top_k": 1,
                    "save_last": False,
                    "filename": "run--{step}-{consumed_samples}",
                    "every_n_train_steps": 2,
                },
            },
            "data": {
                "micro_batch_size": 1,
                "global_batch_size": 4,
                "train_dir": str(root / "train.jsonl"),
                "val_dir": str(root / "val.jsonl"),
                "seq_length": 128,
                "tokenizer": {"type": str(root / "tokenizer")},
            },
            "model": {
                "model_config": str(root / "config.json"),
                "optim": {
                    "name": "adamw_fp32OptState",
                    "lr": 3e-3,
                    "weight_decay": 0.01,
                    "betas": [0.9, 0.999],
                    "sched": {"name": "LinearAnnealingWithWarmUp", "warmup_steps": 2, "max_steps": 20},
                },
            },
            "model_alignment_strategy": {"dpo": {"kl_beta": 0.3, "max_prompt_length": 64}},
            "precision": {"type": "fp32"},
        }

    def arguments(self, *overrides: str) -> list[str]:
        return ["train", "--config-path", str(self.root / "conf"), "--config-name", "run", *overrides]

    def train(self, *overrides: str) -> int:
        """The command line's exit status."""
        self.await_next_second(self.root)
        return main(self.arguments(*overrides))

    def train_spread(self, world: int, *overrides: str) -> str:
        """What ``world`` processes say of a run that must end well, as torchrun starts them."""
        self.await_next_second(self.root)
        return run_forked(world, *self.arguments(*overrides), folder=self.root).well()

    @staticmethod
    def await_next_second(root: Path) -> None:
        """TensorBoard reads a run's event files by name, which holds the second of their start: two of
        one second, as only a test makes them, would be read in either order."""
        files = root.rglob("events.out.tfevents.*")
        newest = max((int(file.name.split(".")[3]) for file in files), default=0)
        time.sleep(max(0.0, newest + 1 - time.time()))

    def runs(self, experiments: str = "experiments") -> list[Path]:
        """Dated folders, oldest first."""
        return sorted((self.root / experiments / "run").glob("20*"))

    def only_run(self, experiments: str = "experiments") -> Path:
        (run,) = self.runs(experiments)
        return run


def train_sh(repo: Path, project: Project, *overrides: str) -> str:
    """What examples/train.sh says of a run that must end well."""
    environment = {**os.environ, "NXDT_ALIGN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["CONF_FILE"] = str(project.root / "conf" / "run.yaml")
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [str(repo / "examples" / "train.sh"), *overrides],
        cwd=project.root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every TensorBoard curve of a run's folder: (step, value), by step.

    Files that one process began in the same second are read in the order of their names, ".10" before ".9".
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return {
        tag: sorted((event.step, event.value) for event in accumulator.Scalars(tag))
        for tag in accumulator.Tags()["scalars"]
    }


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the one checkpoint that a run has left."""
    (folder,) = [f for f in (run / "checkpoints").iterdir() if f.is_dir()]
    source = NativeCheckpoint(folder)
    return {name: source.read(name) for name in source.names()}


def assert_same_run(got: Path, want: Path) -> None:
    """Weights bit for bit, and every logged value but the times."""
    got_weights, want_weights = final_weights(got), final_weights(want)
    assert got_weights.keys() == want_weights.keys()
    assert all(torch.equal(got_weights[name], want_weights[name]) for name in want_weights)
    got_curves, want_curves = scalars(got), scalars(want)
    assert got_curves.keys() == want_curves.keys()
    for tag in want_curves.keys() - TIMES:
        assert got_curves[tag] == want_curves[tag], tag
