"""Completions by transformers' own model and ``generate``, with its key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as hf_logging

from nxdt_align.data.tokenize import Tokens
from nxdt_align.errors import UserError
from nxdt_align.evaluation.generate import Completion, Limits, NotFiniteError, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GREEDY = 0.0


class TransformersModel:
    """The model in a Hugging Face folder.

    Args:
        folder: of weights and config.json; code in it is not run.
        device: where it computes.
        dtype: of weights and activations; None keeps the weights' own on an accelerator, float32 on a CPU.

    Raises UserError where transformers does not load the folder, or finds no value in it for a weight.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> None:
        chosen: torch.dtype | str = dtype or (torch.float32 if device.type == "cpu" else "auto")
        try:
            with _without_bar():
                # transformers' types do not know of the second value.
                both: Any = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=chosen, trust_remote_code=False, output_loading_info=True
                )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"transformers does not load {folder}: {reason}") from error
        loaded, info = both
        # It gives such weights random values. A tied head is not among them.
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{folder} has no {missing[0]}{more}, which its config.json asks for: the folder is not "
                "whole, or config.json is another model's; copy or export it again"
            )
        self._model = loaded.to(device).eval()
        self._device = device
        self.limits = Limits.of(folder)
        # Of the folder's generation config only the tokens that end a text are taken: what else it asks for,
        # such as a penalty, would change tokens that the caller's settings do not mention.
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, ends: Collection[int]
    ) -> list[Completion]:
        torch.manual_seed(sampling.seed)
        found: dict[int, Completion] = {}
        for batch in _batches(prompts, sampling.batch_size):
            for index, completion in zip(
                batch, self._batch([prompts[i] for i in batch], sampling, ends), strict=True
            ):
                found[index] = completion
        return [found[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def logp(self, prompt: Tokens, response: Tokens) -> float:
        """Log-probability of ``response`` behind ``prompt``, summed over its tokens, nats."""
        whole = torch.tensor([[*prompt, *response]], device=self._device)
        logits = self._model(whole[:, :-1]).logits[0, len(prompt) - 1 :].float()
        return float(logits.log_softmax(-1).gather(1, whole[0, len(prompt) :, None]).double().sum())

    def stream(
        self,
        prompt: Tokens,
        sampling: Sampling,
        ends: Collection[int],
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[str], None],
    ) -> Completion:
        """One completion, whose text goes to ``show`` word by word as it is made. Draws go on from the last
        call's."""
        (completion,) = self._batch([prompt], sampling, ends, _Words(tokenizer, show))
        return completion

    @torch.inference_mode()
    def _batch(
        self,
        prompts: Sequence[Tokens],
        sampling: Sampling,
        ends: Collection[int],
        streamer: BaseStreamer | None = None,
    ) -> list[Completion]:
        width = max(map(len, prompts))
        # Padding stands before a prompt, so that all completions begin at one position; masked, it may be
        # any token.
        padding = min(ends, default=0)
        ids = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        scores = _Logprobs(ends, len(prompts))
        made = self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._settings(sampling, ends, padding),
            logits_processor=[scores],
            streamer=streamer,
        )
        scores.add(made[:, -1])
        rows: list[list[int]] = made[:, width:].tolist()
        return [
            _completion(row, ends, logprob) for row, logprob in zip(rows, scores.sums.tolist(), strict=True)
        ]

    def _settings(self, sampling: Sampling, ends: Collection[int], padding: int) -> Any:
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > _GREEDY:
            drawn = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,  # transformers' own default draws from 50 tokens
            }
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=padding,
            **drawn,
        )


class _Logprobs(LogitsProcessor):
    """Sums the log-probabilities of the chosen tokens, and changes nothing.

    It comes before temperature and top-p, so it sees what the model says. Each token is known one call later,
    the last one by ``add``: a table of all logits, (B, new tokens, V), is never kept.
    """

    def __init__(self, ends: Collection[int], rows: int) -> None:
        self.sums = torch.zeros(rows, dtype=torch.float64)
        self._ends = torch.tensor(sorted(ends))
        self._running = torch.ones(rows, dtype=torch.bool)
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self.add(input_ids[:, -1])
        self._last = torch.log_softmax(scores.float(), dim=-1)
        # Before anything is drawn, which NaN would make a crash, or an answer of one token.
        if bool(self._last.isnan().any()):
            raise NotFiniteError
        return scores

    def add(self, tokens: Tensor) -> None:
        """(B,) the tokens that were chosen by the logits seen last."""
        assert self._last is not None
        chosen = self._last.gather(1, tokens[:, None])[:, 0].double().cpu()
        self.sums += torch.where(self._running, chosen, torch.zeros_like(chosen))
        self._running &= ~torch.isin(tokens.cpu(), self._ends)


class _Words(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without transformers' progress bar for weights, which would stand among completions."""
    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _completion(row: list[int], ends: Collection[int], logprob: float) -> Completion:
    """``row``: the new tokens, padded behind the end."""
    length = next((at + 1 for at, token in enumerate(row) if token in ends), None)
    if length is None:
        return Completion(tuple(row), "length", logprob)
    return Completion(tuple(row[:length]), "stop", logprob)


def _batches(prompts: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Indices, prompts of like lengths together, the longest first: where memory does not suffice, that shows
    at once."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
