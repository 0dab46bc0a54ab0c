"""Converters to prompts alone, which are to be answered: a row's response, if it has one, is not read."""

from __future__ import annotations

from dataclasses import replace

from nxdt_align.data.converters import Convert, alpaca_turns, with_system
from nxdt_align.data.records import BadRecord, Record, Row, as_messages, as_prompt, take


def column_prompt(name: str) -> Convert:
    """The prompt is what stands under ``name``: text or chat messages."""

    def convert(row: Row) -> list[Record]:
        return [Record(as_prompt(take(row, name), name), ())]

    return convert


def prompt_of_messages(row: Row) -> list[Record]:
    """``messages``, or ShareGPT's ``conversations``: the turns up to the assistant's last one, which is its
    answer, if the conversation ends with it."""
    name = "conversations" if row.get("conversations") is not None else "messages"
    turns = with_system(row, as_messages(take(row, name), name))
    ends_with_answer = bool(turns) and turns[-1]["role"] == "assistant"
    return [Record(turns[:-1] if ends_with_answer else turns, ())]


def alpaca_prompt(row: Row) -> list[Record]:
    """Alpaca's ``instruction`` and ``input``."""
    return [Record(alpaca_turns(row), ())]


def without_responses(convert: Convert) -> Convert:
    """The prompts of what ``convert`` makes, for formats whose prompt follows from the responses."""

    def convert_prompt(row: Row) -> list[Record | BadRecord]:
        return [each if isinstance(each, BadRecord) else replace(each, responses=()) for each in convert(row)]

    return convert_prompt
