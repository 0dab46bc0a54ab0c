"""Answers with scores, ranks or votes: the pairs of a record's answers, and the best of them.

A pair is any two answers of different scores, the better one chosen, as ``get_se`` of the DPO reference
implementation (eric-mitchell/direct-preference-optimization, preference_datasets.py) makes them. Answers of
the same score say nothing about which is better and give no pair: a record may give none at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from nxdt_align.data.converters import ASSISTANT, HUMAN, Convert
from nxdt_align.data.records import BadRecord, Record, Row, as_text, excerpt, take, take_text

SHP_MIN_RATIO = 2
"""As in ``get_shp`` of the reference implementation: closer scores are noise."""
SAME_SCORES = "all their answers have the same score"
CLOSE_SCORES = f"the better score is below {SHP_MIN_RATIO} times the other, as in the DPO reference"
_MOST = 1e300
"""A score; beyond it are infinities, and integers that no float can hold."""
_MOST_ANSWERS = 200
"""Per record: their pairs grow with the square."""


@dataclass(frozen=True)
class Ranked:
    """A prompt and its answers, each with a score: more is better."""

    prompt: str
    answers: Sequence[tuple[float, str]]


Read = Callable[[Row], Ranked]


def every_pair(read: Read) -> Convert:
    def convert(row: Row) -> list[Record]:
        ranked = read(row)
        found = []
        for first, second in combinations(ranked.answers, 2):
            if first[0] != second[0]:
                better, worse = (first, second) if first[0] > second[0] else (second, first)
                found.append(Record(ranked.prompt, (better[1], worse[1])))
        return found

    return convert


def the_best(read: Read) -> Convert:
    """The answer of the highest score, the first of several."""

    def convert(row: Row) -> list[Record]:
        ranked = read(row)
        return [Record(ranked.prompt, (max(ranked.answers, key=lambda answer: answer[0])[1],))]

    return convert


def read_stack_exchange(row: Row) -> Ranked:
    """HuggingFaceH4/stack-exchange-preferences: ``answers`` of ``text`` and ``pm_score`` (or ``score``), in
    the reference implementation's words. Text is used as it is, with the HTML of a data set that has it."""
    answers = _answers(row, "answers", "text", ("pm_score", "score"))
    prompt = _in_turns(take_text(row, "question"))
    return Ranked(prompt, [(score, " " + text) for score, text in answers])


def read_nectar(row: Row) -> Ranked:
    """berkeley-nest/Nectar: ``answers`` of ``answer`` and ``rank``, where 1 is the best."""
    answers = _answers(row, "answers", "answer", ("rank",))
    return Ranked(take_text(row, "prompt"), [(-rank, text) for rank, text in answers])


def read_ultrafeedback(row: Row) -> Ranked:
    """openbmb/UltraFeedback: ``completions`` of ``response`` and ``overall_score``."""
    answers = _answers(row, "completions", "response", ("overall_score",))
    return Ranked(take_text(row, "instruction"), answers)


def _answers(row: Row, key: str, text: str, scores: tuple[str, ...]) -> list[tuple[float, str]]:
    values = take(row, key)
    if not isinstance(values, list) or not values or not all(isinstance(each, dict) for each in values):
        form = f"{{{text}, {' or '.join(scores)}}}"
        raise BadRecord("wrong type", f"`{key}` must be a list of {form}, but is {excerpt(values)}")
    if len(values) > _MOST_ANSWERS:
        raise BadRecord("too many answers", f"`{key}` has {len(values):,}, above {_MOST_ANSWERS}")
    found = []
    for i, each in enumerate(values):
        score_key = next((name for name in scores if each.get(name) is not None), scores[0])
        score = _number(take(each, score_key), f"{key}[{i}].{score_key}")
        found.append((score, as_text(take(each, text), f"{key}[{i}].{text}")))
    return found


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST < value < _MOST:
        raise BadRecord("wrong type", f"`{name}` must be a number, but is {excerpt(value)}")
    return value


def _in_turns(question: str) -> str:
    return f"{HUMAN} {question}{ASSISTANT}"


def from_stack_exchange_pair(row: Row) -> list[Record]:
    """lvwerra/stack-exchange-paired: ``response_j`` is better than ``response_k``. The prompt's words are
    those of TRL's stack_llama scripts."""
    prompt = f"Question: {take_text(row, 'question')}\n\nAnswer: "
    return [Record(prompt, (take_text(row, "response_j"), take_text(row, "response_k")))]


def from_shp(row: Row) -> list[Record]:
    """stanfordnlp/SHP and SHP-2, in the reference implementation's words: a post (``history``) and two
    comments, of which A (``labels`` is 1) or B (0) is preferred. None where the scores are too close."""
    label = take(row, "labels")
    if label not in (0, 1):
        raise BadRecord("wrong type", f"`labels` must be 1 (A is preferred) or 0, but is {excerpt(label)}")
    comments = [" " + take_text(row, key) for key in ("human_ref_A", "human_ref_B")]
    if _is_close(row):
        return []
    chosen, rejected = comments if label else comments[::-1]
    return [Record(_in_turns(take_text(row, "history")), (chosen, rejected))]


def _is_close(row: Row) -> bool:
    """A record without scores is taken at its label's word."""
    if row.get("score_A") is not None and row.get("score_B") is not None:
        lower, higher = sorted(_number(row[key], key) for key in ("score_A", "score_B"))
        return higher < SHP_MIN_RATIO * lower
    ratio = row.get("score_ratio")
    return ratio is not None and _number(ratio, "score_ratio") < SHP_MIN_RATIO
