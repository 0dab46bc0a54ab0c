"""Write the golden values anew: only in a change that says why they must be others.

    python tests/golden/make.py [values] [written] [project]

``values`` (the default) runs the YAMLs and writes values/*.json. ``written`` writes what a later version
must still read: a run stopped after 3 of 5 steps with its caches, and NxDT's shards of its start weights.
``project`` draws the data and start weights themselves anew, after which both others are due.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "src"), str(TESTS / "support")]
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch  # noqa: E402
from golden_probe import (  # noqa: E402
    PROJECT,
    REPRODUCIBLE,
    RUNS,
    STOPPED,
    VALUES,
    WRITTEN,
    copy_project,
    main,
    read_run,
    resume,
    stopped_project,
    train,
    two_processes,
    values_alone,
)

NEUTRAL = Path("/golden")
"""Checkpoints hold absolute paths: this one is nobody's."""


def draw_project() -> None:
    """Tokenizer, start weights (no two tensors alike, so that each is known by its content) and data."""
    from safetensors.torch import save_file
    from small_tokenizers import make_tokenizer
    from training_fixture import sentence

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(PROJECT / "tokenizer")
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    start = PROJECT / "start"
    start.mkdir(parents=True, exist_ok=True)
    (start / "config.json").write_text(json.dumps(shape, indent=1))
    made = torch.Generator().manual_seed(11)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=made) * 0.2

    weights = {
        "model.embed_tokens.weight": draw(len(tokenizer), 16),
        "lm_head.weight": draw(len(tokenizer), 16),
    }
    weights["model.norm.weight"] = 1 + draw(16)
    for layer in (f"model.layers.{index}." for index in range(2)):
        weights |= {
            f"{layer}input_layernorm.weight": 1 + draw(16),
            f"{layer}post_attention_layernorm.weight": 1 + draw(16),
            f"{layer}self_attn.q_proj.weight": draw(16, 16),
            f"{layer}self_attn.k_proj.weight": draw(8, 16),
            f"{layer}self_attn.v_proj.weight": draw(8, 16),
            f"{layer}self_attn.o_proj.weight": draw(16, 16),
            f"{layer}mlp.gate_proj.weight": draw(32, 16),
            f"{layer}mlp.up_proj.weight": draw(32, 16),
            f"{layer}mlp.down_proj.weight": draw(16, 32),
        }
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    rng = random.Random(3)
    for suffix, count in (("", 24), ("_val", 5)):
        pairs = [
            {
                "prompt": f"{index} {sentence(rng, 1, 10)}",
                "chosen": "the " + sentence(rng, 1, 7),
                "rejected": "a " + sentence(rng, 1, 7),
            }
            for index in range(count)
        ]
        responses = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs]
        labelled = [
            {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for p in pairs
            for side in ("chosen", "rejected")
        ]
        for name, rows in (("pairs", pairs), ("responses", responses), ("labelled", labelled)):
            (PROJECT / f"{name}{suffix}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_values() -> None:
    VALUES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        alone = values_alone(copy_project(Path(one)), list(RUNS))
        together = two_processes(copy_project(Path(two)), list(RUNS))
    with tempfile.TemporaryDirectory() as folder:
        resumed = read_run(resume(stopped_project(Path(folder))))
    for name in RUNS:
        values = {"one process": alone[name], "two processes": together[name]}
        if name == STOPPED:
            values["resumed"] = resumed
        (VALUES / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


def write_what_later_versions_read() -> None:
    shutil.rmtree(WRITTEN, ignore_errors=True)
    if any(os.environ.get(name) != value for name, value in REPRODUCIBLE.items()):
        raise SystemExit(f"write these in an environment of {REPRODUCIBLE}: torch has read it by now")
    NEUTRAL.mkdir()
    try:
        copy_project(NEUTRAL)
        run = train(NEUTRAL, STOPPED, "trainer.max_steps=3", "exp_manager.export_hf=False")
        WRITTEN.mkdir()
        shutil.copytree(NEUTRAL / f"cache_{STOPPED}", WRITTEN / "cache")
        kept = WRITTEN / "run"
        kept.mkdir()
        shutil.copy(run / "run_identity.json", kept)
        shutil.copytree(run / "checkpoints", kept / "checkpoints")
        shards = ["--tp", "2", "--pp", "2", "--kv-replicator", "2", "--no-verify", "--quiet"]
        assert main(["convert", str(NEUTRAL / "start"), str(WRITTEN / "shards"), *shards]) == 0
    finally:
        shutil.rmtree(NEUTRAL)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    steps = {"project": draw_project, "written": write_what_later_versions_read, "values": write_values}
    for wanted in sys.argv[1:] or ["values"]:
        steps[wanted]()
