"""What the policy answers while it trains: completions of fixed validation prompts, beside its first ones and
the reference's.

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
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nxdt_align.config.experiment import SampleConfig
from nxdt_align.config.start import SAMPLES_FILE
from nxdt_align.engines.base import Engine
from nxdt_align.files import append_lines, atomic_write, explain, read_lines
from nxdt_align.messages import NOTICE
from nxdt_align.training.texts import write_table

log = logging.getLogger(__name__)

_STATE = "sample_during_eval"
"""The count's key in a checkpoint."""
_KEY = "exp_manager.sample_during_eval"
COLUMNS = ("prompt", "before training", "now", "the data's answer")
SampledReference = Literal["start", "other"] | None
"""Whether the reference is what the policy starts this run from; None: there is none."""


@dataclass(frozen=True)
class SamplePrompt:
    """A validation prompt, and what the data answer."""

    tokens: tuple[int, ...]
    text: str
    answer: str


class SampleDuringEval(Callback):
    """Lets the policy answer ``prompts`` before the first step of a run and at every k-th validation, and a
    reference that is another model once.

    Args:
        prompts: the same on every rank.
        length: tokens of a row that the longest prompt and its completion fit into.
        at_once: prompts of a forward pass, at most.
        ends: tokens that end a completion.
        decode: tokens -> text, special tokens left out.
        folder: the run's.
        seed: of draws, where ``settings.temperature`` is above 0.
        is_new: the run has no checkpoint of its own, so that its first step comes next.
        reference: of a new run; a later process has its answers from the file.
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
        is_new: bool = False,
        reference: SampledReference = None,
    ) -> None:
        self._engine, self._prompts, self._settings = engine, prompts, settings
        self._length, self._at_once = length, at_once
        self._ends, self._decode = ends, decode
        self._file, self._seed = folder / SAMPLES_FILE, seed
        self._is_new, self._starts_as_reference = is_new, reference == "start"
        self.wants_reference = is_new and reference == "other"
        """Whether ``ask_reference`` is to be called."""
        self._validations = 0
        self._counted_at: int | None = None
        """The step of the newest validation that ``_validations`` has; -1 for none, None where neither this
        process nor its checkpoint has counted."""
        self._before: Mapping[int, str] = {}
        """Prompt's index -> its completion before the first step; empty where that is not known."""
        self._reference: Mapping[int, str] = {}
        """The same, of the reference's."""

    def ask_reference(self, is_loaded: bool) -> None:
        """Collective. Keep what the engine's frozen reference answers, where it has one now."""
        if is_loaded:
            made = self._complete(f"{self._seed}:reference", reference=True)
            self._reference = dict(enumerate(self._texts(made)))
        else:
            log.log(
                NOTICE,
                "%s: without the reference's answers, as its log-probabilities are all stored and it is not "
                "loaded",
                _KEY,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 or self._is_new:
            # Another run's checkpoint, which this one goes on from, has that one's count.
            self._validations, self._counted_at = 0, None
            self._before = dict(enumerate(self._sample(trainer, is_first=True)))
            if self._starts_as_reference:
                self._reference = self._before
            return
        own = self._resume(trainer.global_step) if trainer.is_global_zero else None
        sampled, self._before, self._reference = self._engine.broadcast_object(own)
        self._starts_as_reference = bool(self._reference) and self._reference == self._before
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

    def _complete(self, seed: str, *, reference: bool = False) -> list[list[int]]:
        """Collective. The tokens of completions, in the order of the prompts."""
        settings = self._settings
        draw = _draws(settings.temperature, seed) if settings.temperature > 0 else None
        return [
            row
            for start in range(0, len(self._prompts), self._at_once)
            for row in self._engine.greedy(
                [prompt.tokens for prompt in self._prompts[start : start + self._at_once]],
                length=self._length,
                max_tokens=settings.max_tokens,
                ends=self._ends,
                draw=draw,
                reference=reference,
            )
        ]

    def _texts(self, made: Sequence[Sequence[int]]) -> list[str]:
        return [self._decode(row[:-1] if row[-1] in self._ends else row) for row in made]

    def _sample(self, trainer: Trainer, *, is_first: bool = False) -> list[str]:
        """Collective. The completions, in the order of the prompts; ``is_first``: those before training."""
        step = trainer.global_step
        made = self._complete(f"{self._seed}:{step}")
        texts = self._texts(made)
        # The answers before training are made right now, and may be the reference's as well.
        reference = dict(enumerate(texts)) if is_first and self._starts_as_reference else self._reference
        if trainer.is_global_zero:
            rows = [
                {
                    "step": step,
                    "validation": self._validations,
                    "index": index,
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    "before": self._before.get(index),
                    "reference": reference.get(index),
                    "completion": text,
                    "tokens": len(row),
                    "finish_reason": "stop" if row[-1] in self._ends else "length",
                }
                for index, (prompt, text, row) in enumerate(zip(self._prompts, texts, made, strict=True))
            ]
            self._write(trainer, rows, step)
        return texts

    def _resume(self, step: int) -> tuple[int, dict[int, str], dict[int, str]]:
        """Cut what the steps after ``step``, which are taken again, have written, and what a kill has left.

        Returns the validations up to the newest sampling, the completions before the first step, and the
        reference's.
        """
        lines, kept, validations = read_lines(self._file), [], 0
        before: dict[int, str] = {}
        reference: dict[int, str] = {}
        for line in lines:
            try:
                row = json.loads(line)
                at, number, index, text = (row[key] for key in ("step", "validation", "index", "completion"))
                if at > step:
                    continue
                validations = int(number)
                if number == 0:  # of no validation: before the first step
                    before[int(index)] = str(text)
                    if row.get("reference") is not None:  # nor in files of earlier versions
                        reference[int(index)] = str(row["reference"])
            except (ValueError, LookupError, TypeError):
                continue
            kept.append(line)
        if kept != lines:
            with self._or_warn():
                atomic_write(self._file, "".join(f"{line}\n" for line in kept).encode())
        return validations, before, reference

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
        prompt, before, *others = COLUMNS
        if self._starts_as_reference:
            before = f"{before} (the reference)"
        columns = [prompt, before, *others]
        if self._reference and not self._starts_as_reference:
            columns.insert(1, "the reference")
            for row, of in zip(shown, rows, strict=True):
                row.insert(1, of["reference"] or "")
        write_table(trainer.loggers, "samples", columns, shown, step)


def _draws(temperature: float, seed: str) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator()
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)

    def draw(logits: Tensor) -> Tensor:
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

    return draw
