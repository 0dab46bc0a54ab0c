"""Runs whose graphs are recorded, and processes that record them: with neuronx-distributed's source where it
can be imported, else with our own stand-ins of its layers (``nxd_stand_ins``)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from nxd_source import supply_neuron_only_modules

from nxdt_align.models.presets import LLAMA3_8B, DecoderConfig

STAND_INS = Path(__file__).parent / "nxd_stand_ins"
WITHOUT_STAND_INS = ("DPO, a pipeline",)
"""What needs the real source."""
SMALL = replace(
    LLAMA3_8B, vocab_size=2048, hidden_size=512, head_dim=16, intermediate_size=1024, num_hidden_layers=2
)
"""Heads that 32 ranks divide, as those of Llama-3-8B."""
TRUE = replace(LLAMA3_8B, num_hidden_layers=2)
SHORT, LONG = "100,200,180", "1024,992,992"
LORA = (
    *("model_alignment_strategy.peft.target_modules=[all-linear]", "model_alignment_strategy.peft.rank=8"),
    "model_alignment_strategy.peft.dropout=0.1",
)
RUNS: dict[str, tuple[str, ...]] = {
    "DPO": ("hf_llama3_8B_DPO_config",),
    "DPO packed, validated": (
        "hf_llama3_8B_DPO_config",
        "data.packing=packed",
        "trainer.limit_val_batches=1.0",
    ),
    "DPO none, flash": (
        *("hf_llama3_8B_DPO_config", "data.packing=none", "data.seq_length=2048"),
        "model_alignment_strategy.dpo.max_prompt_length=1024",
        "model.fusions.flash_attention=True",
    ),
    "DPO, packed flash": (
        *("hf_llama3_8B_DPO_config", "model.fusions.flash_attention=True"),
        "model.fusions.flash_attention_packed=True",
    ),
    "DPO aot": (
        *("hf_llama3_8B_DPO_config", "model_alignment_strategy.dpo.loss_type=aot"),
        "model_alignment_strategy.dpo.precompute_ref_log_probs=False",
    ),
    "ORPO": ("hf_llama3_8B_ORPO_config", "distributed_strategy.sequence_parallel=False"),
    "KTO": ("hf_llama3_8B_KTO_config", "precision.type=bf16SR", "distributed_strategy.zero1=False"),
    "DPO discopop, divergence": (
        *("hf_llama3_8B_DPO_config", "model_alignment_strategy.dpo.loss_type=discopop"),
        "model_alignment_strategy.dpo.f_divergence_type=forward_kl",
    ),
    "LoRA": ("hf_llama3_8B_DPO_config", *LORA),
    "LoRA at each step, data parallel": (
        *("hf_llama3_8B_DPO_config", "distributed_strategy.tensor_model_parallel_size=8"),
        *("distributed_strategy.kv_replicator=1", "model.fuse_qkv=True", *LORA),
        "model_alignment_strategy.dpo.precompute_ref_log_probs=False",
    ),
    "DPO, a pipeline": (
        *("hf_llama3_8B_DPO_config", "distributed_strategy.tensor_model_parallel_size=16"),
        *("distributed_strategy.kv_replicator=2", "distributed_strategy.pipeline_model_parallel_size=2"),
    ),
    "data parallel": (
        *("hf_llama3_8B_DPO_config", "distributed_strategy.tensor_model_parallel_size=8"),
        *("distributed_strategy.kv_replicator=1", "model.fuse_qkv=True"),
    ),
}


def arguments(folder: Path, model: DecoderConfig, run: tuple[str, ...], lengths: str) -> list[str]:
    (folder / "config.json").write_text(json.dumps(model.to_hf_dict()))
    sizes = (f"model.hidden_size={model.hidden_size}", f"model.num_layers={model.num_hidden_layers}")
    shape = (f"model.model_config={folder}/config.json", *sizes, "data.val_dir=/nowhere.jsonl")
    return ["graphs", "--config-name", run[0], "--lengths", lengths, *shape, *run[1:]]


def require_torch_xla() -> None:
    """Skip where it is not importable."""
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("torch_xla is not here")


def environment() -> dict[str, str]:
    """Of a process that records, with the stand-ins where neuronx-distributed is not importable."""
    is_here = importlib.util.find_spec("neuronx_distributed") is not None
    supply_neuron_only_modules()
    path = [*sys.path, *([] if is_here else [str(STAND_INS)])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in path if each)}


class Recorder:
    """Records runs one after the other, each in a process forked off one that has imported what all need."""

    def __init__(self, folder: Path, given: IO[str], answers: IO[str]) -> None:
        self._folder, self._given, self._answers = folder, given, answers
        self._count = 0

    def __call__(self, arguments: Sequence[str], *first: Path) -> list[dict[str, Any]]:
        """The tables that ``nxdt-align`` writes for ``arguments``.

        Args:
            first: folders to import from before all others.
        """
        self._count += 1
        folder = self._folder / f"recording {self._count}"
        folder.mkdir()
        order = {
            "arguments": [*arguments, "--json"],
            "folder": str(folder),
            "path": list(map(str, first)),
        }
        print(json.dumps(order), file=self._given, flush=True)
        status = self._answers.readline().strip()
        assert status == "0", f"status {status}: {(folder / 'stderr').read_text()[-3000:]}"
        tables: list[dict[str, Any]] = json.loads((folder / "stdout").read_text())
        return tables


@contextmanager
def recorder(folder: Path) -> Iterator[Recorder]:
    """A Recorder, whose files are in ``folder``."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("graph_recorder.py"))],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        # Leaving closes its input, at the end of which it ends.
        yield Recorder(folder, process.stdin, process.stdout)
