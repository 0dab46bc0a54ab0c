"""What the policy answers while it trains: completions of fixed validation prompts, beside its first ones.

Each sampling is written to ``samples.jsonl`` in the run's folder, a line per prompt, and to the loggers. A
run's steps are the same with it: nothing here draws from a generator that the run uses.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nxdt_align.config.experiment import SampleConfig
from nxdt_align.config.start import SAMPLES_FILE
from nxdt_align.engines.base import Engine
from nxdt_align.files import append_lines, atomic_write, explain, read_lines
from nxdt_align.training.texts import write_table

log = logging.getLogger(__name__)

_STATE = "sample_during_eval"
"""The count's key in a checkpoint."""
COLUMNS = ("prompt", "before training", "now", "the data's answer")


@dataclass(frozen=True)
class SamplePrompt:
    """A validation prompt, and what the data answer."""

    tokens: tuple[int, ...]
    text: str
    answer: str


class SampleDuringEval(Callback):
    """Lets the policy answer ``prompts`` before the first step of a run and at every k-th validation.

    Args:
        prompts: the same on every rank.
        length: tokens of a row that the longest prompt and its completion fit into.
        at_once: prompts of a forward pass, at most.
        ends: tokens that end a completion.
        decode: tokens -> text, special tokens left out.
        folder: the run's.
        seed: of draws, where ``settings.temperature`` is above 0.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[SamplePrompt],
        settings: SampleConfig,
        *,
        length: int,
        at_once: int,
        ends: Collection[int],
        decode: Callable[[Sequence[int]], str],
        folder: Path,
        seed: int,
    ) -> None:
        self._engine, self._prompts, self._settings = engine, prompts, settings
        self._length, self._at_once = length, at_once
        self._ends, self._decode = ends, decode
        self._file, self._seed = folder / SAMPLES_FILE, seed
        self._validations = 0
        self._counted_at: int | None = None
        """The step of the newest validation that ``_validations`` has; -1 for none, None where neither this
        process nor its checkpoint has counted."""
        self._before: Mapping[int, str] = {}
        """Prompt's index -> its completion before the first step; empty where that is not known."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._before = dict(enumerate(self._sample(trainer)))
            return
        own = self._resume(trainer.global_step) if trainer.is_global_zero else None
        sampled, self._before = self._engine.broadcast_object(own)
        if self._counted_at is None:  # a checkpoint of an earlier version
            self._validations = sampled

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations, self._counted_at = self._counted(trainer.global_step)
        if self._validations % self._settings.every_n_validations == 0:
            self._sample(trainer)

    def _counted(self, step: int) -> tuple[int, int]:
        """The validations with that of ``step``, which the checkpoint of ``step`` may have counted."""
        return self._validations + (self._counted_at != step), step

    # Not state_dict, for whose state Lightning misses the callback in a run that goes on without samples.

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        count, at = self._validations, -1 if self._counted_at is None else self._counted_at
        # A checkpoint is written before the validation of its step, which a resumed run does not run again.
        # Only RunCheckpoint tells; a callback of the user's may save where there is none.
        follows = getattr(trainer.checkpoint_callback, "validation_follows", None)
        if follows is not None and follows(trainer):
            count, at = self._counted(trainer.global_step)
        checkpoint[_STATE] = {"validations": count, "counted_at": at}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get(_STATE)
        if state is not None:
            self._validations, self._counted_at = int(state["validations"]), int(state["counted_at"])

    def _sample(self, trainer: Trainer) -> list[str]:
        """Collective. The completions, in the order of the prompts."""
        step, settings = trainer.global_step, self._settings
        draw = _draws(settings.temperature, f"{self._seed}:{step}") if settings.temperature > 0 else None
        made = [
            row
            for start in range(0, len(self._prompts), self._at_once)
            for row in self._engine.greedy(
                [prompt.tokens for prompt in self._prompts[start : start + self._at_once]],
                length=self._length,
                max_tokens=settings.max_tokens,
                ends=self._ends,
                draw=draw,
            )
        ]
        has_ended = [row[-1] in self._ends for row in made]
        texts = [self._decode(row[:-1] if ended else row) for row, ended in zip(made, has_ended, strict=True)]
        if trainer.is_global_zero:
            rows = [
                {
                    "step": step,
                    "validation": self._validations,
                    "index": index,
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    "before": self._before.get(index),
                    "completion": text,
                    "tokens": len(row),
                    "finish_reason": "stop" if ended else "length",
                }
                for index, (prompt, text, row, ended) in enumerate(
                    zip(self._prompts, texts, made, has_ended, strict=True)
                )
            ]
            self._write(trainer, rows, step)
        return texts

    def _resume(self, step: int) -> tuple[int, dict[int, str]]:
        """Cut what the steps after ``step``, which are taken again, have written, and what a kill has left.

        Returns the validations up to the newest sampling, and the completions before the first step.
        """
        lines, kept, validations, before = read_lines(self._file), [], 0, {}
        for line in lines:
            try:
                row = json.loads(line)
                at, number, index, text = (row[key] for key in ("step", "validation", "index", "completion"))
                if at > step:
                    continue
                validations = int(number)
                if at == 0:
                    before[int(index)] = str(text)
            except (ValueError, LookupError, TypeError):
                continue
            kept.append(line)
        if kept != lines:
            with self._or_warn():
                atomic_write(self._file, "".join(f"{line}\n" for line in kept).encode())
        return validations, before

    @contextmanager
    def _or_warn(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s cannot be written: %s; training goes on without it", self._file, explain(error))

    def _write(self, trainer: Trainer, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        with self._or_warn():
            append_lines(self._file, [json.dumps(row, ensure_ascii=False) for row in rows])
        shown = [[r["prompt"], r["before"] or "", r["completion"], r["answer"]] for r in rows]
        write_table(trainer.loggers, "samples", COLUMNS, shown, step)


def _draws(temperature: float, seed: str) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator()
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)

    def draw(logits: Tensor) -> Tensor:
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

    return draw
