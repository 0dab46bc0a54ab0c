"""Data in every shape that the data module reads, and hashes of what it makes of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from small_tokenizers import CHATML, make_tokenizer

from nxdt_align.batch import Topology
from nxdt_align.config.load import load_config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.tokenize import Tokenization, Truncation

WORDS = [
    "What",
    "is",
    "two",
    "plus",
    "three",
    "five",
    "a",
    "colour",
    "Blue",
    "red",
    "and",
    "so",
    "name",
    "it",
    "to",
]
OF_OBJECTIVE = {
    "dpo": (),
    "orpo": ("~model_alignment_strategy.dpo", "model_alignment_strategy.orpo.beta=0.1"),
    "kto": ("~model_alignment_strategy.dpo", "model_alignment_strategy.kto.beta=0.1"),
    "sft": ("~model_alignment_strategy.dpo", "model_alignment_strategy.sft.train_on_prompt=True"),
}


def write_sources(folder: Path) -> None:
    """Three files: text with equal records and bad ones, conversations, and text with special tokens."""
    rng = random.Random(15)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    plain: list[Any] = [
        {"prompt": f"{i} {text(30)}", "chosen": f" {text(25)}", "rejected": f" {text(25)}!", "note": "x"}
        for i in range(160)
    ]
    plain += [plain[3], plain[70], {"prompt": "two", "chosen": " "}, "no object"]
    rng.shuffle(plain)
    chats = [
        {
            "prompt": [{"role": "user", "content": f"{i} {text(12)}"}],
            "chosen": [{"role": "assistant", "content": text(12)}],
            "rejected": [{"role": "assistant", "content": text(12) + "?"}],
        }
        for i in range(60)
    ]
    special = [
        {"prompt": f"<s>{text(9)}", "chosen": f"{text(9)}</s> ", "rejected": text(5) + " é ✓"}
        for _ in range(50)
    ]
    for name, rows in (("plain", plain), ("chats", chats), ("special", special)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_module(
    folder: Path,
    sources: str,
    *overrides: str,
    objective: str = "dpo",
    layout: str = "shared_prompt",
    ranks: int = 1,
    cache: Path | None = None,
) -> ModelAlignmentDataModule:
    """The data module of ``sources`` (a path, or a list in YAML) as a run of this many ranks makes it."""
    config = load_config(
        "tiny_llama_DPO_config",
        [
            f"data.train_dir={sources.replace('@', str(folder))}",
            "data.val_dir=null",
            *("data.on_bad_record=drop", "data.seq_length=64", "data.global_batch_size=8"),
            *(f"data.packing={layout}", "data.buckets=null", "data.micro_batch_size=1"),
            *OF_OBJECTIVE[objective],
            *overrides,
        ],
    )
    tokenization = Tokenization(make_tokenizer(template=CHATML), Truncation(64, 32))
    return ModelAlignmentDataModule(config, tokenization, Topology(data_parallel_size=ranks), cache_dir=cache)


def hashes(module: ModelAlignmentDataModule) -> dict[str, str]:
    """Of the tokens of all examples, the order of two epochs, the rows of every step of both, and the
    micro-batches of the reference pass."""
    dataset = module.splits["train"]
    examples, planner, sampler = dataset.examples, dataset.planner, module._train_sampler
    tokens = (
        [e.record_id, e.prompt.tolist(), [r.tolist() for r in e.responses], e.desirable]
        for e in (examples[i] for i in range(len(examples)))
    )
    order = [list(step) for epoch in range(2) for step in sampler.steps(epoch)]
    plans = (
        [plan.bucket.tokens, plan.bucket.responses, plan.bucket.slots, [list(row) for row in plan.rows]]
        for plan in (planner.plan(step) for step in order)
    )
    reference = (
        [m.bucket.tokens, m.bucket.responses, m.bucket.slots, [list(row) for row in m.rows]]
        for m in dataset.reference_plan()
    )
    kept = [
        examples.truncated,
        examples.identical_after_truncation,
        np.asarray(examples.prompt_lengths).tolist(),
        np.asarray(examples.response_lengths).tolist(),
    ]
    named: dict[str, Iterable[Any]] = {
        "ids": module.record_ids("train"),
        "tokens": tokens,
        "lengths": kept,
        "order": order,
        "rows": plans,
        "reference": reference,
    }
    return {name: _hash(values) for name, values in named.items()}


def _hash(values: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()
