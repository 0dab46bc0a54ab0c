"""A conversation with a model on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nxdt_align.data.records import BadRecord, Message, Record
from nxdt_align.data.tokenize import Tokenization
from nxdt_align.errors import UserError
from nxdt_align.evaluation.generate import Sampling, require_known, stop_tokens, text_of
from nxdt_align.evaluation.transformers_model import TransformersModel

HELP = "/new begins another conversation, /exit or Ctrl-D ends"


def converse(
    model: TransformersModel,
    tokenization: Tokenization,
    sampling: Sampling,
    *,
    system: str | None,
    ask: Callable[[], str | None],
    show: Callable[[str], None],
) -> None:
    """Answer what ``ask`` returns, turn by turn, until that is None or ``/exit``.

    Args:
        system: the conversation's first turn.
        ask: the next line of the user.
        show: gets an answer's text as it is made, and a line end behind it.

    Raises UserError where the tokenizer has no chat template, or it refuses the conversation, or is not
    the model's.
    """
    if not tokenization.tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, so how a conversation is written is unknown: give the "
            "folder of a chat model's tokenizer (--tokenizer DIR), or continue texts with nxdt-align generate"
        )
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns = list(begin)
    while (line := ask()) is not None and line.strip() != "/exit":
        if line.strip() == "/new":
            turns = list(begin)
            continue
        if not line.strip():
            continue
        turns.append({"role": "user", "content": line})
        record = Record(turns, ())
        (prompt,) = tokenization.prompts([record])
        if isinstance(prompt, BadRecord):
            raise UserError(prompt.detail)
        require_known(tokenization, model, [prompt])
        room = _room(model, len(prompt), sampling.max_tokens)
        if room < 1:
            show(f"(it fills all {model.limits.positions} positions: /new begins another conversation)\n")
            turns.pop()
            continue
        ends = stop_tokens(tokenization, model, [record])
        answer = model.stream(prompt, replace(sampling, max_tokens=room), ends, tokenization.tokenizer, show)
        show("\n")
        turns.append({"role": "assistant", "content": text_of(tokenization, answer, ends)})


def _room(model: TransformersModel, length: int, wanted: int) -> int:
    positions = model.limits.positions
    return wanted if positions is None else min(wanted, positions - length)
