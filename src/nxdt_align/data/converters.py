"""Converters: one row of a file to its records. formats.py says which row each is for.

A converter raises BadRecord if the row does not fit, and returns a BadRecord for a part of the row that does
not. A key whose value is null counts as missing: Arrow writes nulls for keys that other rows have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nxdt_align.data.records import (
    BadRecord,
    Message,
    Prompt,
    Record,
    Response,
    Row,
    as_answer,
    as_messages,
    as_prompt,
    as_text,
    excerpt,
    take,
    take_text,
)

Convert = Callable[[Row], Sequence[Record | BadRecord]]

_STRONG_BORDER, _SENTENCE_END = re.compile(r"\n+|[>\]]|[:?](?=\s)"), re.compile(r"[.!](?=\s)")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""The turn marks of Anthropic's HH-RLHF transcripts."""


# Pairs


def from_pairs(row: Row) -> list[Record]:
    """``prompt``, ``chosen``, ``rejected``: text, or chat messages; chosen and rejected may be whole
    conversations that begin with the prompt (TRL's form), and then ``prompt`` may be missing."""
    chosen, rejected = (_listed(take(row, key)) for key in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return [_from_conversations(prompt, as_messages(chosen, "chosen"), as_messages(rejected, "rejected"))]
    responses = (as_answer(chosen, "chosen"), as_answer(rejected, "rejected"))
    return [Record(as_prompt(take(row, "prompt"), "prompt"), responses)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


def _from_conversations(prompt: Any, chosen: list[Message], rejected: list[Message]) -> Record:
    shared = _shared_turns(chosen, rejected)
    responses = (as_answer(chosen[shared:], "chosen"), as_answer(rejected[shared:], "rejected"))
    turns = chosen[:shared]
    if prompt is None:
        if not turns:
            found = f"chosen begins {excerpt(chosen[:1])}, rejected {excerpt(rejected[:1])}"
            raise BadRecord("no common prompt", found)
        return Record(turns, responses)
    return Record(_merge_prompt(as_prompt(prompt, "prompt"), turns), responses)


def _merge_prompt(prompt: Prompt, turns: list[Message]) -> list[Message]:
    """``prompt`` merged with the turns that chosen and rejected share, which must agree with it."""
    if isinstance(prompt, str):
        if not turns and prompt.strip():
            return [{"role": "user", "content": prompt}]
        agrees = not prompt.strip() or any(prompt.strip() == turn["content"].strip() for turn in turns)
    elif prompt[-len(turns) :] == turns or not turns:
        return prompt
    else:
        agrees = turns[: len(prompt)] == prompt
    if not agrees:
        found = f"`prompt` is {excerpt(prompt)}, but chosen begins {excerpt(turns)}"
        raise BadRecord("no common prompt", found)
    return turns


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Number of equal turns at the start; the last turn of either is a response, never part of the prompt."""
    longest = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(longest) if chosen[i] != rejected[i]), max(longest, 0))


def from_fairseq2(row: Row) -> list[Record]:
    """fairseq2's ``src``, ``tgt_chosen``, ``tgt_rejected``."""
    chosen, rejected = (as_answer(take(row, key), key) for key in ("tgt_chosen", "tgt_rejected"))
    return [Record(as_prompt(take(row, "src"), "src"), (chosen, rejected))]


def from_orca(row: Row) -> list[Record]:
    """Intel/orca_dpo_pairs in ChatML, character for character as the NxD Training tutorial writes it."""
    question, chosen, rejected = (take_text(row, key) for key in ("question", "chosen", "rejected"))
    for key, text in (("question", question), ("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRecord("empty prompt" if key == "question" else "empty response", f"`{key}` is {text!r}")
    system = "<|im_start|>\n" + take_text(row, "system") + "<|im_end|>\n"
    # The space and the missing role are in the tutorial's script.
    prompt = "<|im_start|> " + question + "<|im_end|>\n<|im_start|>assistant\n"
    return [Record(system + prompt, (chosen + "<|im_end|>\n", rejected + "<|im_end|>\n"))]


def from_hh(row: Row) -> list[Record]:
    """Two transcripts that differ in the last assistant turn; the prompt ends with its "Assistant:"."""
    prompt, chosen = _split_transcript(take_text(row, "chosen"), "chosen")
    other_prompt, rejected = _split_transcript(take_text(row, "rejected"), "rejected")
    if prompt != other_prompt:
        at = _first_difference(prompt, other_prompt)
        raise BadRecord(
            "no common prompt",
            f"before the last answer, chosen has {excerpt(prompt[at : at + 40])} "
            f"where rejected has {excerpt(other_prompt[at : at + 40])}",
        )
    return [Record(prompt, (chosen, rejected))]


def _first_difference(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _split_transcript(text: str, name: str) -> tuple[str, str]:
    # From the right: earlier turns hold the same mark.
    before, mark, answer = text.rpartition(ASSISTANT)
    if not mark or HUMAN in answer:
        raise BadRecord("no final assistant turn", f"`{name}` ends {excerpt(text[-60:])}")
    return before + mark, answer


def from_alpaca(row: Row) -> list[Record]:
    """Alpaca's ``instruction`` and ``input``, with ``chosen`` and ``rejected``."""
    responses = (as_answer(take(row, "chosen"), "chosen"), as_answer(take(row, "rejected"), "rejected"))
    return [Record(_alpaca_prompt(row), responses)]


def _alpaca_prompt(row: Row) -> str:
    """The task and, on the next line, its material, either of which may be empty."""
    material = row.get("input")
    if material is None:
        return take_text(row, "instruction")
    parts = (as_text(row.get("instruction") or "", "instruction"), as_text(material, "input"))
    return "\n".join(part for part in parts if part.strip())


def from_common_beginning(row: Row) -> list[Record]:
    """``chosen`` and ``rejected`` text that both begin with the prompt, which stands nowhere else.

    The prompt ends at the last border in what they have in common: behind a line end, ``>``, ``]``, ``:`` or
    ``?``, or, where there is none of these, behind a sentence. Answers that begin alike keep their words, and
    no word is cut.
    """
    chosen, rejected = take_text(row, "chosen"), take_text(row, "rejected")
    common = _first_difference(chosen, rejected)
    for border in (_STRONG_BORDER, _SENTENCE_END):
        ends = [match.end() for match in border.finditer(chosen) if match.end() <= common]
        ends = [
            end for end in ends if chosen[:end].strip() and chosen[end:].strip() and rejected[end:].strip()
        ]
        if ends:
            return [Record(chosen[: ends[-1]], (chosen[ends[-1] :], rejected[ends[-1] :]))]
    raise BadRecord("no common prompt", f"chosen begins {excerpt(chosen)}, rejected {excerpt(rejected)}")


def from_sharegpt(row: Row) -> list[Record]:
    """ShareGPT's ``conversations`` with ``chosen`` and ``rejected`` turns."""
    prompt = as_messages(take(row, "conversations"), "conversations")
    responses = (as_answer(take(row, "chosen"), "chosen"), as_answer(take(row, "rejected"), "rejected"))
    return [Record(prompt, responses)]


def from_responses(row: Row) -> list[Record | BadRecord]:
    """The DPO reference implementation's form: ``responses`` and index pairs, the preferred one first.

    A bad pair takes no other pair of its row with it.
    """
    prompt, texts = as_prompt(take(row, "prompt"), "prompt"), _texts(row)
    pairs = take(row, "pairs")
    if not isinstance(pairs, list) or not pairs:
        raise BadRecord(
            "wrong type", f"`pairs` must list [chosen, rejected] indices, but is {excerpt(pairs)}"
        )
    return [_pair_of(pair, prompt, texts) for pair in pairs]


def _pair_of(pair: Any, prompt: Prompt, texts: list[Response]) -> Record | BadRecord:
    numbers = isinstance(pair, list | tuple) and all(type(i) is int for i in pair)
    if not numbers or len(pair) != 2:
        return BadRecord("wrong type", f"a pair must be two indices into `responses`, but is {excerpt(pair)}")
    if not all(0 <= i < len(texts) for i in pair):
        return BadRecord("pair index out of range", f"{excerpt(pair)} with {len(texts)} responses")
    return Record(prompt, (texts[pair[0]], texts[pair[1]]))


def _texts(row: Row) -> list[Response]:
    responses = take(row, "responses")
    if not isinstance(responses, list):
        raise BadRecord("wrong type", f"`responses` must be a list of texts, but is {excerpt(responses)}")
    return [as_answer(text, f"responses[{i}]") for i, text in enumerate(responses)]


# One response


def from_messages(row: Row) -> list[Record]:
    """``messages``, or ShareGPT's ``conversations``: the last turn is the response."""
    name = "conversations" if row.get("conversations") is not None else "messages"
    turns = as_messages(take(row, name), name)
    return [Record(turns[:-1], (as_answer(turns[-1:], name),))]


def from_input_output(row: Row) -> list[Record]:
    """``input``, ``output``. Refuses Alpaca's ``instruction`` beside them: it is part of the prompt, and
    ``alpaca`` is the format that reads it."""
    instruction = row.get("instruction")
    if isinstance(instruction, str) and instruction.strip():
        found = f"`instruction` is {excerpt(instruction)} beside `input`; set data.format=alpaca to join them"
        raise BadRecord("instruction beside input", found)
    return [Record(as_prompt(take(row, "input"), "input"), (as_answer(take(row, "output"), "output"),))]


def from_alpaca_response(row: Row) -> list[Record]:
    """Alpaca's ``instruction``, ``input`` and ``output``, or the chosen response of a pair."""
    name = "chosen" if row.get("output") is None and row.get("chosen") is not None else "output"
    return [Record(_alpaca_prompt(row), (as_answer(take(row, name), name),))]


def from_columns(prompt: str, response: str) -> Convert:
    def convert(row: Row) -> list[Record]:
        return [Record(as_prompt(take(row, prompt), prompt), (as_answer(take(row, response), response),))]

    return convert


def preferred(convert: Convert) -> Convert:
    """Single responses from pairs: the chosen one, as in the DPO reference implementation's SFT."""

    def convert_preferred(row: Row) -> list[Record | BadRecord]:
        return [replace(r, responses=r.responses[:1]) if isinstance(r, Record) else r for r in convert(row)]

    return convert_preferred


# A response with a label


def from_unpaired(row: Row) -> list[Record]:
    """``prompt``, ``completion``, ``label``: true (or 1) for a desirable completion, false (or 0) for
    another. Prompt and completion are text or chat messages (TRL's form)."""
    label = take(row, "label")
    if label not in (True, False):
        raise BadRecord("wrong type", f"`label` must be true or false, but is {excerpt(label)}")
    completion = as_answer(take(row, "completion"), "completion")
    return [Record(as_prompt(take(row, "prompt"), "prompt"), (completion,), bool(label))]
