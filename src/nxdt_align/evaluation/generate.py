"""Completions of prompts: which tokens a model is asked with, and what is written of its answers.

The model itself is a ``Generator``: transformers' or vLLM's, see the modules of these names.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from nxdt_align.data.records import BAD_PROMPTS_ADVICE, BadRecord, BadRecords, DataError, Prompt, Record
from nxdt_align.data.tokenize import Tokenization, Tokens, keep_last
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.weights.generation import read_generation
from nxdt_align.weights.hf_writer import CONFIG

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises UserError for values out of range."""

    temperature: float = 0.0
    """0 takes the likeliest token (greedy); otherwise logits are divided by it."""
    top_p: float = 1.0
    """Of the likeliest tokens, those that together have this probability are drawn from."""
    max_tokens: int = 256
    """New tokens per prompt, its end included."""
    batch_size: int = 8
    """Prompts at a time; vLLM chooses its own."""
    seed: int = 0
    """Of what is drawn where temperature is above 0."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: must be at least 0, but is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p: must be above 0 and at most 1, but is {self.top_p}")
        for name, value in (("max-tokens", self.max_tokens), ("batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name}: must be at least 1, but is {value}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: must be from 0 to {2**32 - 1}, but is {self.seed}")


class NotFiniteError(UserError):
    """A model's log-probabilities are NaN, or infinite for what it chose."""

    def __init__(self) -> None:
        super().__init__(
            "the model's log-probabilities are not finite: its weights are damaged, or overflow in their "
            "dtype, which --dtype fp32 rules out"
        )


@dataclass(frozen=True)
class Completion:
    """A model's answer to one prompt."""

    tokens: tuple[int, ...]
    """With the token that ended it, if one did."""
    finish_reason: FinishReason
    """``stop``: the model ended it; ``length``: the limit did."""
    logprob: float
    """Natural log-probability of all ``tokens`` under the model itself: temperature 1, every token."""


@dataclass(frozen=True)
class Limits:
    """What a model's folder says about its completions."""

    positions: int | None
    """Tokens that a prompt and its completion may have together; None where the model sets no limit."""
    ends: frozenset[int]
    """Tokens that end a completion, by generation_config.json or else config.json."""
    vocabulary: int | None = None
    """Rows of the embedding; None where config.json does not say."""

    @classmethod
    def of(cls, folder: Path) -> Limits:
        """Of a Hugging Face folder. Raises UserError where its files cannot be read."""
        try:
            shape = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            shape = {**shape, **(shape.get("text_config") or {})}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / CONFIG} cannot be read: {error}; copy it again") from error
        said = (read_generation(folder) or {}).get("eos_token_id")
        ends = shape.get("eos_token_id") if said is None else said
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        positions, vocabulary = (shape.get(key) for key in ("max_position_embeddings", "vocab_size"))
        return cls(
            positions if isinstance(positions, int) and positions > 0 else None,
            frozenset(listed),
            vocabulary if isinstance(vocabulary, int) else None,
        )


class Generator(Protocol):
    """A model that continues prompts."""

    @property
    def limits(self) -> Limits: ...

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, ends: Collection[int]
    ) -> list[Completion]:
        """A completion per prompt, in their order; ``ends`` are the tokens to stop at. Raises
        NotFiniteError."""
        ...


def prompt_tokens(tokenization: Tokenization, records: Sequence[Record]) -> list[Tokens]:
    """Of each record's prompt, as training tokenizes it. Raises DataError with all bad records."""
    found = tokenization.prompts(records)
    bad = BadRecords(read=len(records))
    good: list[Tokens] = []
    for record, each in zip(records, found, strict=True):
        if isinstance(each, BadRecord):
            bad.add(record.source, each)
        elif not each:
            bad.add(record.source, BadRecord("prompt without tokens", "the tokenizer makes no token of it"))
        else:
            good.append(each)
    if bad.total:
        raise DataError(f"{bad.summary()}\n{BAD_PROMPTS_ADVICE}")
    return good


def complete(
    records: Sequence[Record], tokenization: Tokenization, model: Generator, sampling: Sampling
) -> list[dict[str, Any]]:
    """The completions as rows for JSON, in the order of ``records``.

    A prompt that leaves no room for ``max_tokens`` keeps BOS and its last tokens, as in training, and its row
    says ``prompt_truncated``. Raises DataError for prompts that cannot be tokenized, UserError where
    ``max_tokens`` leaves no room for any prompt, the model does not know the tokenizer's tokens, or what it
    says is not finite.
    """
    prompts = prompt_tokens(tokenization, records)
    require_known(tokenization, model, prompts)
    room = _room(model.limits.positions, sampling.max_tokens)
    bos = tokenization.tokenizer.bos_token_id
    kept = [prompt if room is None else keep_last(prompt, room, bos) for prompt in prompts]
    cut = [len(short) < len(whole) for short, whole in zip(kept, prompts, strict=True)]
    if any(cut):
        log.log(
            NOTICE,
            "%d of %d prompts are longer than %d tokens, what the model's %s positions leave beside "
            "--max-tokens %d: their beginnings are cut",
            *(sum(cut), len(cut), room or 0, model.limits.positions, sampling.max_tokens),
        )
    ends = stop_tokens(tokenization, model, records)
    completions = model.generate(kept, sampling, ends)
    return [
        _row(record, prompt, completion, tokenization, ends, was_cut)
        for record, prompt, completion, was_cut in zip(records, kept, completions, cut, strict=True)
    ]


def require_known(tokenization: Tokenization, model: Generator, prompts: Sequence[Tokens]) -> None:
    """Raise UserError where a token of ``prompts`` has no row in the model's embedding."""
    vocabulary = model.limits.vocabulary
    largest = max((token for prompt in prompts for token in prompt), default=0)
    if vocabulary is None or largest < vocabulary:
        return
    tokenizer = tokenization.tokenizer
    raise UserError(
        f"a prompt has the token {largest}, but the model has a vocabulary of {vocabulary}: the tokenizer "
        f"{tokenizer.name_or_path}, of {len(tokenizer)} tokens, is not the model's; name its own with "
        "--tokenizer DIR, or leave that out where the model's folder has one"
    )


def stop_tokens(tokenization: Tokenization, model: Generator, records: Sequence[Record]) -> frozenset[int]:
    """The model's own, the tokenizer's EOS and, for chats, the token that ends an assistant's turn: what
    training lets responses end with."""
    end = tokenization.turn_end() if any(not isinstance(r.prompt, str) for r in records) else None
    eos = tokenization.tokenizer.eos_token_id
    return model.limits.ends | {eos, *(() if end is None else (end,))}


def text_of(tokenization: Tokenization, completion: Completion, ends: Collection[int]) -> str:
    """Without the token that ended it."""
    tokens = list(completion.tokens)
    if completion.finish_reason == "stop" and tokens and tokens[-1] in ends:
        tokens.pop()
    return str(tokenization.tokenizer.decode(tokens, skip_special_tokens=True))


def _room(positions: int | None, max_tokens: int) -> int | None:
    if positions is None:
        return None
    if max_tokens >= positions:
        raise UserError(
            f"max-tokens: must be below the model's {positions} positions, which the prompt needs a part of, "
            f"but is {max_tokens}"
        )
    return positions - max_tokens


def _row(
    record: Record,
    prompt: Tokens,
    completion: Completion,
    tokenization: Tokenization,
    ends: Collection[int],
    was_cut: bool,
) -> dict[str, Any]:
    asked: Prompt = record.prompt
    return {
        "prompt": asked,
        "completion": text_of(tokenization, completion, ends),
        "finish_reason": completion.finish_reason,
        "logprob": completion.logprob,
        "completion_tokens": len(completion.tokens),
        "prompt_tokens": len(prompt),
        **({"prompt_truncated": True} if was_cut else {}),
        **({"tools": record.tools} if record.tools else {}),
        "source": record.source,
    }
