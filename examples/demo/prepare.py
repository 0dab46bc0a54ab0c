"""Make the demo's tokenizer, model configuration and data: ``python -m demo.prepare --out DIR``.

Under DIR: ``tokenizer/``, ``model_config.json``, and in ``data/`` three files of text records:
``sft.jsonl`` (prompt, response), ``train.jsonl`` and ``heldout.jsonl`` (prompt, chosen, rejected). The
demonstrations of ``sft.jsonl`` are as imperfect as real ones: writers were careless with hard
instructions. The preference pairs have been checked. No held-out instruction occurs in the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from demo.models import LLAMA, MAX_POSITIONS, MODELS, model_config
from demo.task import Problem, draw_problem
from nxdt_align.errors import UserError
from nxdt_align.files import atomic_folder, atomic_write, explain

CARELESS_EASY = 0.1
CARELESS_HARD = 0.65
"""Share of wrong demonstrations. Above a half on hard instructions, so that a model that imitates
them faithfully gets those wrong; below one, so that it also learns how to get them right."""
TOKENIZER_VOCABULARY = 384
"""At most so many tokens: 3 special ones, 256 bytes and merges for the instructions' words."""
PAD, BOS, EOS = "<pad>", "<s>", "</s>"

Record = dict[str, str]


@dataclass(frozen=True)
class Sizes:
    """Records in each file."""

    sft: int = 16000
    train: int = 3200
    heldout: int = 320


@dataclass(frozen=True)
class DemoData:
    """Text records, as in the three files."""

    sft: list[Record]
    train: list[Record]
    heldout: list[Record]


def make_data(seed: int, sizes: Sizes | None = None) -> DemoData:
    """The records for a seed, the same on every machine. Held-out instructions are in heldout only."""
    sizes = sizes or Sizes()
    rng = Random(seed)
    held_out: dict[str, Problem] = {}
    while len(held_out) < sizes.heldout:
        problem = draw_problem(rng)
        held_out[problem.instruction] = problem
    compared = dict(held_out)
    while len(compared) < sizes.heldout + sizes.train:
        problem = draw_problem(rng)
        compared[problem.instruction] = problem
    return DemoData(
        sft=[_demonstration(_draw_other(rng, held_out), rng) for _ in range(sizes.sft)],
        train=[_pair(problem) for key, problem in compared.items() if key not in held_out],
        heldout=[_pair(problem) for problem in held_out.values()],
    )


def _draw_other(rng: Random, excluded: Collection[str]) -> Problem:
    """A problem whose instruction is none of ``excluded``."""
    while True:
        problem = draw_problem(rng)
        if problem.instruction not in excluded:
            return problem


def _pair(problem: Problem) -> Record:
    return {"prompt": problem.instruction, "chosen": problem.right, "rejected": problem.wrong}


def _demonstration(problem: Problem, rng: Random) -> Record:
    careless = rng.random() < (CARELESS_HARD if problem.is_hard else CARELESS_EASY)
    return {"prompt": problem.instruction, "response": problem.wrong if careless else problem.right}


def make_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer (PreTrainedTokenizerFast) that writes BOS before a text, as Llama's does.

    Every item of a list is one token, wherever it stands: a space goes before the first one too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=MAX_POSITIONS
    )


def prepare(out: Path, seed: int, sizes: Sizes | None = None, model: str = LLAMA) -> DemoData:
    """Write everything under ``out``, each file and folder whole or not at all. Raises OSError.

    Args:
        model: a key of ``MODELS``.
    """
    data = make_data(seed, sizes)
    for name, records in (("sft", data.sft), ("train", data.train), ("heldout", data.heldout)):
        atomic_write(out / "data" / f"{name}.jsonl", _json_lines(records))
    tokenizer = make_tokenizer(f"{record['prompt']} {record['response']}" for record in data.sft)
    with atomic_folder(out / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
    config = model_config(
        model, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    atomic_write(out / "model_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return data


def _json_lines(records: Sequence[Mapping[str, str]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _describe(data: DemoData, out: Path) -> str:
    pair = data.heldout[0]
    return (
        f"{out / 'data'}: {len(data.sft)} demonstrations for the warm-up, "
        f"{len(data.train)} preference pairs, {len(data.heldout)} held-out pairs\n"
        f"A pair:  {pair['prompt']}\n  chosen    {pair['chosen']}\n  rejected  {pair['rejected']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.prepare", description="Make the demo's data.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=1234, help="draws the records (default: %(default)s)")
    parser.add_argument(
        "--model", choices=MODELS, default=LLAMA, help="family of the small model (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        print(_describe(prepare(options.out, options.seed, model=options.model), options.out))
    except OSError as error:
        raise UserError(f"cannot write the demo's data to {options.out}: {explain(error)}") from error
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
