"""Converters: one row of a file to its records. formats.py says which row each is for.

A converter raises BadRecord if the row does not fit, and returns a BadRecord for a part of the row that does
not. A key whose value is null counts as missing: Arrow writes nulls for keys that other rows have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
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
    as_tools,
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
    return [value] if not isinstance(value, str) and isinstance(value, Mapping) else value


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
    return [Record(alpaca_turns(row), responses)]


def alpaca_turns(row: Row) -> Prompt:
    """The task and, on the next line, its material, either of which may be empty. LLaMA-Factory's ``system``
    and ``history`` ([question, answer] each) are turns before it, and it is then the last turn."""
    material = row.get("input")
    if material is None:
        task = take_text(row, "instruction")
    else:
        parts = (as_text(row.get("instruction") or "", "instruction"), as_text(material, "input"))
        task = "\n".join(part for part in parts if part.strip())
    turns = [*_system_turn(row), *_history(row)]
    return [*turns, {"role": "user", "content": task}] if turns and task.strip() else task


def _system_turn(row: Row) -> list[Message]:
    system = as_text(row.get("system") or "", "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _history(row: Row) -> Iterator[Message]:
    rounds = row.get("history") or []
    if not isinstance(rounds, list) or not all(isinstance(each, list) and len(each) == 2 for each in rounds):
        raise BadRecord("wrong type", f"`history` must list [question, answer], but is {excerpt(rounds)}")
    for i, each in enumerate(rounds):
        for role, text in zip(("user", "assistant"), each, strict=True):
            yield {"role": role, "content": as_text(text, f"history[{i}]")}


def from_common_beginning(row: Row) -> list[Record]:
    """``chosen`` and ``rejected`` text that both begin with the prompt, which stands nowhere else.

    The prompt ends at the last border in what they have in common: behind a line end, ``>``, ``]``, ``:`` or
    ``?``, or, where there is none of these, behind a sentence. Answers that begin alike keep their words, and
    no word is cut.
    """
    chosen, rejected = take_text(row, "chosen"), take_text(row, "rejected")
    common = _first_difference(chosen, rejected)
    # Neither the prompt nor a response may be white space alone.
    least = len(chosen) - len(chosen.lstrip()) + 1
    most = min(common, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    for border in (_STRONG_BORDER, _SENTENCE_END):
        ends = takewhile(lambda end: end <= most, (match.end() for match in border.finditer(chosen)))
        end = max(ends, default=0)
        if end >= least:
            return [Record(chosen[:end], (chosen[end:], rejected[end:]))]
    raise BadRecord("no common prompt", f"chosen begins {excerpt(chosen)}, rejected {excerpt(rejected)}")


def from_sharegpt(row: Row) -> list[Record]:
    """ShareGPT's ``conversations`` with ``chosen`` and ``rejected``: a turn each, or, as for ``pairs``, whole
    conversations."""
    prompt = with_system(row, as_messages(take(row, "conversations"), "conversations"))
    chosen, rejected = (_listed(take(row, key)) for key in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return [_from_conversations(prompt, as_messages(chosen, "chosen"), as_messages(rejected, "rejected"))]
    return [Record(prompt, (as_answer(chosen, "chosen"), as_answer(rejected, "rejected")))]


def with_system(row: Row, turns: list[Message]) -> list[Message]:
    """LLaMA-Factory's column ``system`` is the first turn of a conversation that does not say it itself."""
    system = _system_turn(row)
    own = [turn for turn in turns[:1] if turn["role"] == "system"]
    if system and own and own != system:
        found = f"`system` is {excerpt(row['system'])}, the first turn {excerpt(own[0]['content'])}"
        raise BadRecord("two system prompts", found)
    return turns if own else [*system, *turns]


def from_openai(row: Row) -> list[Record]:
    """OpenAI's preference fine-tuning: ``input`` with ``messages``, and ``tools`` if any;
    ``preferred_output``, ``non_preferred_output``."""
    given = take(row, "input")
    if not isinstance(given, Mapping):
        raise BadRecord("wrong type", f"`input` must be {{messages}}, but is {excerpt(given)}")
    tools = as_tools(given["tools"], "input.tools") if given.get("tools") else None
    prompt = as_messages(take(given, "messages"), "input.messages")
    names = ("preferred_output", "non_preferred_output")
    chosen, rejected = (as_answer(take(row, name), name) for name in names)
    return [Record(prompt, (chosen, rejected), tools=tools)]


def from_torchtune(row: Row) -> list[Record]:
    """torchtune's ``chosen_conversations`` and ``rejected_conversations``: whole conversations."""
    names = ("chosen_conversations", "rejected_conversations")
    return [_from_conversations(None, *(as_messages(take(row, name), name) for name in names))]


def from_swift(row: Row) -> list[Record]:
    """ms-swift's ``messages``, whose last turn is chosen, and ``rejected_response``."""
    (chosen,) = from_messages(row)
    rejected = as_answer(take(row, "rejected_response"), "rejected_response")
    return [replace(chosen, responses=(*chosen.responses, rejected))]


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
    turns = with_system(row, as_messages(take(row, name), name))
    return [Record(turns[:-1], (as_answer(turns[-1:], name),))]


def from_alpaca_response(row: Row) -> list[Record]:
    """Alpaca's ``instruction``, ``input`` and ``output``, or the chosen response of a pair."""
    name = "chosen" if row.get("output") is None and row.get("chosen") is not None else "output"
    return [Record(alpaca_turns(row), (as_answer(take(row, name), name),))]


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


def labelled(convert: Convert, key: str) -> Convert:
    """Single responses with a label under ``key``: true (or 1) for a desirable one, else false (or 0)."""

    def convert_labelled(row: Row) -> list[Record | BadRecord]:
        label = take(row, key)
        if label not in (True, False):
            raise BadRecord("wrong type", f"`{key}` must be true or false, but is {excerpt(label)}")
        return [replace(r, label=bool(label)) if isinstance(r, Record) else r for r in convert(row)]

    return convert_labelled


OF_BOTH_KINDS = "each of their responses is chosen in one pair and rejected in another"


def both_labelled(convert: Convert) -> Convert:
    """Two labelled responses from a pair: chosen is desirable, rejected is not.

    Each response of a row counts once. One that is chosen in a pair and rejected in another, as the middle
    ones of a ranking are, is neither and is left out.
    """

    def convert_both(row: Row) -> list[Record | BadRecord]:
        found: list[Record | BadRecord] = []
        labels: dict[object, set[bool]] = {}
        halves: dict[object, Record] = {}
        for pair in convert(row):
            if isinstance(pair, BadRecord):
                found.append(pair)
            elif pair.responses[0] == pair.responses[1]:
                found.append(BadRecord("chosen equal to rejected", excerpt(pair.responses[0])))
            else:
                for label, response in zip((True, False), pair.responses, strict=True):
                    half = replace(pair, responses=(response,), label=label)
                    content = response if isinstance(response, str) else (repr(response),)
                    halves.setdefault(content, half)
                    labels.setdefault(content, set()).add(label)
        return found + [half for content, half in halves.items() if len(labels[content]) == 1]

    return convert_both
