"""What a Hugging Face folder makes of the held-out pairs: computed by transformers alone, in fp32.

Nothing here comes from the trainer, so its figures and its export are checked from outside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from demo.task import is_right, read_problem
from nxdt_align.errors import UserError

Objective = Literal["dpo", "orpo"]
Array = np.ndarray[Any, np.dtype[np.float64]]
BATCH = 64
MAX_NEW_TOKENS = 24
"""The longest right answer has 8 tokens, EOS included."""


@dataclass(frozen=True)
class Pair:
    """A held-out pair, as text."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Likelihoods:
    """A model's log-probabilities of the pairs' responses, EOS included, in the pairs' order."""

    chosen: Array
    """(N,) nats: sums over the chosen responses' tokens."""
    rejected: Array
    """(N,) nats."""
    chosen_tokens: Array
    """(N,)"""
    rejected_tokens: Array
    """(N,)"""


@dataclass(frozen=True)
class Evaluation:
    """A model on the held-out pairs."""

    likelihoods: Likelihoods
    completions: tuple[str, ...]
    """Greedy completions of the prompts."""
    right: tuple[bool, ...]
    """Which of them are right."""

    @property
    def share_right(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Rewards:
    """Rewards of the pairs' responses, (N,) each."""

    chosen: Array
    rejected: Array

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen response has the higher reward; a tie counts as half."""
        return float(np.mean((self.chosen > self.rejected) + 0.5 * (self.chosen == self.rejected)))

    @property
    def margin(self) -> float:
        return float(np.mean(self.chosen - self.rejected))


def rewards(objective: Objective, beta: float, policy: Likelihoods, reference: Likelihoods) -> Rewards:
    """DPO: beta * (log p_policy - log p_reference), https://arxiv.org/abs/2305.18290 section 4.
    ORPO: beta * mean token log-probability of the policy, as TRL and NxD Training log it."""
    if objective == "orpo":
        return Rewards(
            beta * policy.chosen / policy.chosen_tokens, beta * policy.rejected / policy.rejected_tokens
        )
    return Rewards(beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected))


def read_pairs(path: Path) -> list[Pair]:
    """The held-out pairs of a file, or of ``heldout.jsonl`` in a folder.

    Raises UserError where it is missing, empty or holds something else than the demo's pairs.
    """
    path = path / "heldout.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"--data: {path} does not exist; python -m demo.prepare makes it")
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [_read_pair(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not pairs:
        raise UserError(f"--data: {path} is empty; python -m demo.prepare makes it afresh")
    return pairs


def _read_pair(line: str, place: str) -> Pair:
    try:
        record = json.loads(line)
        pair = Pair(record["prompt"], record["chosen"], record["rejected"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{place}: not a JSON object with prompt, chosen and rejected ({error!r})") from error
    read_problem(pair.prompt)
    return pair


class HuggingFaceModel:
    """A model and its tokenizer from a folder, in fp32 on the CPU.

    Raises UserError where the folder is none that transformers can load.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        progress: Any = logging
        progress.disable_progress_bar()

        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a Hugging Face model folder: it has no config.json")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} cannot be loaded by transformers: {error}") from error
        self.model = model.float().eval()
        self.padding = int(self.tokenizer.pad_token_id)

    def evaluate(self, pairs: Sequence[Pair]) -> Evaluation:
        completions = self._complete([pair.prompt for pair in pairs])
        verdicts = (is_right(pair.prompt, text) for pair, text in zip(pairs, completions, strict=True))
        return Evaluation(self.likelihoods(pairs), completions, tuple(verdicts))

    def _complete(self, prompts: Sequence[str]) -> tuple[str, ...]:
        import torch

        texts: list[str] = []
        for some in _batches(prompts):
            inputs = self.tokenizer(some, return_tensors="pt", padding=True, padding_side="left")
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=self.padding,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
            answers = output[:, inputs["input_ids"].shape[1] :]
            texts += self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return tuple(text.strip() for text in texts)

    def likelihoods(self, pairs: Sequence[Pair]) -> Likelihoods:
        """Log-probabilities of the pairs' responses."""
        chosen, chosen_tokens = self._logps([(pair.prompt, pair.chosen) for pair in pairs])
        rejected, rejected_tokens = self._logps([(pair.prompt, pair.rejected) for pair in pairs])
        return Likelihoods(chosen, rejected, chosen_tokens, rejected_tokens)

    def _logps(self, texts: Sequence[tuple[str, str]]) -> tuple[Array, Array]:
        """Sums of the responses' token log-probabilities and their token counts, (N,) each."""
        sums, counts = [], []
        for some in _batches(texts):
            values, has_label = self._token_logps([self._tokens(*text) for text in some])
            sums.append(values.sum(1))
            counts.append(has_label.sum(1).astype(np.float64))
        return np.concatenate(sums), np.concatenate(counts)

    def _tokens(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Prompt with BOS, response with EOS."""
        start = list(self.tokenizer(prompt)["input_ids"])
        end = list(self.tokenizer(response, add_special_tokens=False)["input_ids"])
        return start, [*end, int(self.tokenizer.eos_token_id)]

    def _token_logps(self, sequences: Sequence[tuple[list[int], list[int]]]) -> tuple[Array, Array]:
        """(B, S-1) log-probabilities of the response tokens, 0 elsewhere, and where they stand."""
        import torch

        longest = max(len(prompt) + len(response) for prompt, response in sequences)
        ids = torch.full((len(sequences), longest), self.padding)
        is_response = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, response) in enumerate(sequences):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor(prompt + response)
            is_response[row, len(prompt) : end] = True
        # Padding stands to the right, where causal attention does not look.
        with torch.inference_mode():
            logps = torch.log_softmax(self.model(input_ids=ids).logits[:, :-1].float(), dim=-1)
        targets, has_label = ids[:, 1:], is_response[:, 1:]
        values = logps.gather(-1, targets[..., None])[..., 0].double() * has_label
        return values.numpy(), has_label.numpy()


def _batches(items: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), BATCH):
        yield list(items[start : start + BATCH])
