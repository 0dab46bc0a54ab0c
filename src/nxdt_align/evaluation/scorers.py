"""How right a completion is: exact match, the final number as in gsm8k, or a function of the user's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Complex, Real
from typing import Any, SupportsFloat

from nxdt_align.errors import UserError
from nxdt_align.own_parts import OwnPartError, describe, find, require_call

Scored = Mapping[str, Any]
"""What a scorer is told of a record: ``prompt`` (text or messages), ``answer`` (the chosen or only response's
text, None where there is none), ``rejected`` (None but for pairs) and ``source``."""
Score = Callable[[str, Scored], Any]

_NUMBER = r"-?[$€£]?\s?\d[\d,]*(?:\.\d+)?"
_FINAL = re.compile(rf"####\s*({_NUMBER})")


def exact(completion: str, record: Scored) -> float:
    """1 where both texts are the same but for white space, case and a full stop at the end."""
    return float(_plain(completion) == _plain(record["answer"]))


def gsm8k(completion: str, record: Scored) -> float:
    """1 where the final numbers are equal: what follows ``####``, else the last number of the text (Cobbe et
    al. 2021, https://arxiv.org/abs/2110.14168)."""
    said, right = final_number(completion), final_number(record["answer"])
    return float(said is not None and said == right)


SCORERS: Mapping[str, Score] = {"exact": exact, "gsm8k": gsm8k}
"""Those that compare with the record's answer."""


def final_number(text: str) -> Decimal | None:
    marked = _FINAL.search(text)
    found = [marked[1]] if marked else re.findall(_NUMBER, text)
    return Decimal(re.sub(r"[^\d.-]", "", found[-1])) if found else None


def choose_scorer(name: str, answers: Sequence[str | None]) -> tuple[str, Score | None]:
    """The scorer called ``name``: one of SCORERS, the dotted path of a function (completion, record) ->
    number, ``none``, or ``auto``: gsm8k where every answer has its ``####``, else exact, or none without
    answers.

    Returns its name, too. Raises UserError.
    """
    without = sum(answer is None for answer in answers)
    if name == "auto":
        if without:
            return "none", None
        name = "gsm8k" if all(_FINAL.search(answer or "") for answer in answers) else "exact"
    if name == "none":
        return name, None
    if name in SCORERS:
        if without:
            raise UserError(
                f"score: {name} compares with the data's answers, but {without} of {len(answers)} records "
                "have none; give data with responses, or a scorer of your own, which need not read an answer"
            )
        return name, SCORERS[name]
    if "." not in name:
        raise UserError(
            f"score: must be auto, none, {', '.join(SCORERS)} or the dotted path of a function (completion, "
            f"record), but is {name!r}"
        )
    try:
        function = find(name)
        require_call(function, name, "completion", "record")
    except OwnPartError as error:
        raise UserError(f"score: {error}") from error
    return name, function


def scored(name: str, score: Score, completion: str, record: Scored, whose: str) -> float:
    """The score of one completion. Raises UserError that names the record where the scorer fails, or returns
    no finite number."""
    try:
        value = score(completion, record)
    except Exception as error:
        # User code may raise anything; the message quotes it.
        raise UserError(
            f"score: {name} raises {type(error).__name__}: {error}, on record {record['source']} and the "
            f"completion of {whose}, {completion[:80]!r}"
        ) from error
    number = _number(value)
    if not math.isfinite(number):
        raise UserError(
            f"score: {name} must return a finite number, but returned {describe(value)} on record "
            f"{record['source']} and the completion of {whose}, {completion[:80]!r}"
        )
    return number


def _number(value: object) -> float:
    """Of whatever stands for a real number, as numpy's and torch's do; NaN where it is none."""
    # numpy's texts and complex numbers have a __float__, too.
    if isinstance(value, str | bytes) or (isinstance(value, Complex) and not isinstance(value, Real)):
        return math.nan
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # an array's, or of 400 digits
        return math.nan


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".")
