"""The prompts that a run answers during evaluation (``exp_manager.sample_during_eval``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.token_sets import TokenizedSet
from nxdt_align.data.tokenize import Tokenization, keep_last
from nxdt_align.engines.base import Engine
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.models.presets import ModelShape
from nxdt_align.training.samples import SampledReference, SampleDuringEval, SamplePrompt

log = logging.getLogger(__name__)

_KEY = "exp_manager.sample_during_eval"


def sample_callbacks(
    config: Config,
    engine: Engine,
    data: ModelAlignmentDataModule,
    tokenization: Tokenization,
    generation: Mapping[str, Any],
    model: ModelShape,
    *,
    row_multiple: int,
    folder: Path,
    is_new: bool,
    reference: SampledReference,
) -> list[SampleDuringEval]:
    """None where no samples are asked for, or where the run cannot make them, which is said.

    Args:
        generation: the content of the export's generation_config.json.
        row_multiple: tokens that rows have to be a multiple of.
        folder: the run's.
        is_new: the run has no checkpoint of its own yet.
        reference: what it is, to the policy.

    Raises UserError where ``max_tokens`` leaves a prompt no room in the model's positions.
    """
    settings = config.exp_manager.sample_during_eval
    if not settings.prompts or not config.validates:
        return []
    if engine.lazy or engine.compiler is not None:
        log.log(
            NOTICE,
            "%s: no samples are made where each shape of rows is compiled into a graph; %snxdt-align "
            "generate answers prompts with a checkpoint or the export",
            *(_KEY, "" if engine.lazy else "distributed_strategy.compile=none makes them; "),
        )
        return []
    positions = model.max_position_embeddings
    if settings.max_tokens >= positions:
        raise UserError(
            f"{_KEY}.max_tokens: must be below the model's {positions} positions, which the prompt needs a "
            f"part of, but is {settings.max_tokens}"
        )
    room = positions - settings.max_tokens
    prompts = _prompts(data.splits["val"].examples, tokenization, settings.prompts, room)
    whole = max(len(prompt.tokens) for prompt in prompts) + settings.max_tokens
    length = -(-whole // row_multiple) * row_multiple
    ended = generation.get("eos_token_id")
    ends = {tokenization.tokenizer.eos_token_id, *(ended if isinstance(ended, list) else [ended])} - {None}
    made = SampleDuringEval(
        engine,
        prompts,
        settings,
        length=length,
        # No pass takes more tokens than a micro-batch of the run may.
        at_once=max(1, config.data.micro_batch_size * config.data.seq_length // length),
        ends=frozenset(ends),
        decode=lambda tokens: _text(tokenization, tokens),
        folder=folder,
        seed=config.seed,
        is_new=is_new,
        reference=reference,
    )
    return [made]


def _prompts(examples: TokenizedSet, tokenization: Tokenization, count: int, room: int) -> list[SamplePrompt]:
    """The first ``count`` different ones, each with its first response; a longer prompt than ``room`` keeps
    BOS and its last tokens."""
    found: dict[tuple[int, ...], SamplePrompt] = {}
    for index in range(len(examples)):
        if len(found) == count:
            break
        example = examples.apart(index)
        whole = [int(token) for token in example.prompt]
        kept = keep_last(whole, room, tokenization.tokenizer.bos_token_id)
        answer = _text(tokenization, example.responses[0].tolist())
        found.setdefault(tuple(whole), SamplePrompt(tuple(kept), _text(tokenization, whole), answer))
    return list(found.values())


def _text(tokenization: Tokenization, tokens: Any) -> str:
    return str(tokenization.tokenizer.decode(list(tokens), skip_special_tokens=True))
