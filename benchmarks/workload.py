"""What is measured on: models by size, preference data, a tokenizer trained on that data."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nxdt_align.data.reading import Source, load_records
from nxdt_align.data.records import Record
from nxdt_align.data.token_sets import TokenizedSet, tokenize_records
from nxdt_align.data.tokenize import Tokenization, Truncation
from nxdt_align.models.presets import LLAMA3_2_1B, LLAMA3_8B, DecoderConfig

VOCABULARY = 32000
SEQ_LENGTH, MAX_PROMPT = 4096, 2048
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODELS = {
    "24m": DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=48,
        max_position_embeddings=SEQ_LENGTH,
    ),
    "24m-qwen3": DecoderConfig(
        model_type="qwen3",
        qk_norm="head",
        vocab_size=VOCABULARY,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=48,
        max_position_embeddings=SEQ_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "100m": DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=10,
        head_dim=64,
        max_position_embeddings=SEQ_LENGTH,
    ),
    "1b": replace(LLAMA3_2_1B, max_position_embeddings=SEQ_LENGTH, rope_scaling=None),
    "8b": replace(LLAMA3_8B, max_position_embeddings=SEQ_LENGTH),
}


@dataclass(frozen=True)
class Workload:
    """One data set under one tokenizer."""

    name: str
    records: Sequence[Record]
    examples: TokenizedSet
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    """Pairs of an optimizer step."""


def load_workload(name: str, path: Path, batch_size: int, cache: Path) -> Workload:
    """The pairs of a file, the bad ones left out, tokenized as training tokenizes them."""
    tokenizer = trained_tokenizer(path, cache)
    found = load_records([Source(str(path), None)], "pair", on_bad_record="drop", seed=0)
    tokenization = Tokenization(tokenizer, Truncation(SEQ_LENGTH, MAX_PROMPT, "keep_start"))
    examples = tokenize_records(found.records, tokenization, cache / "tokens")
    return Workload(name, found.records, examples, tokenizer, batch_size)


def trained_tokenizer(path: Path, cache: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE of VOCABULARY tokens trained on the file's text; kept by the file's content."""
    folder = cache / f"tokenizer-{hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()}"
    if not (folder / "tokenizer.json").exists():
        special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(_texts(path), trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
        )
        fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _texts(path: Path) -> Iterator[str]:
    """Every string in a JSON or JSON-lines file, gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode()
    rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    for row in rows:
        yield from _strings(row)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
