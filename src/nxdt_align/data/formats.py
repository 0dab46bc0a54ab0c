"""The formats of preference data, each converted to prompt and responses. No other module knows formats.

A format is one function, ``row -> records``, that raises BadRecord if the row does not fit. It is detected
from the row's keys (the first format of the table at the end that has them all) or named by ``data.format``,
which may also be the dotted path of a custom function. A key whose value is null counts as missing: Arrow
writes nulls for keys that other rows have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nxdt_align.config.fields import is_dotted
from nxdt_align.data.converters import (
    ASSISTANT,
    OF_BOTH_KINDS,
    Convert,
    both_labelled,
    from_alpaca,
    from_alpaca_response,
    from_columns,
    from_common_beginning,
    from_fairseq2,
    from_hh,
    from_messages,
    from_openai,
    from_orca,
    from_pairs,
    from_responses,
    from_sharegpt,
    from_swift,
    from_torchtune,
    labelled,
    preferred,
)
from nxdt_align.data.prompts import (
    alpaca_prompt,
    column_prompt,
    prompt_of_messages,
    without_responses,
)
from nxdt_align.data.ranked import (
    CLOSE_SCORES,
    SAME_SCORES,
    every_pair,
    from_shp,
    from_stack_exchange_pair,
    read_nectar,
    read_stack_exchange,
    read_ultrafeedback,
    the_best,
)
from nxdt_align.data.records import BadRecord, DataError, Record, Row
from nxdt_align.errors import UserError
from nxdt_align.own_parts import OwnPartError, describe, find, require_call

FORMAT_KEY = "data.format"
"""What names a format in a YAML file."""
Kind = Literal["pair", "response", "unpaired", "prompt"]
"""``prompt``: of any record the prompt alone, to be answered."""


# The tables


@dataclass(frozen=True)
class Format:
    name: str
    """What ``data.format`` calls it."""
    keys: tuple[str, ...]
    """The keys that a row must have to match the format; empty for a custom format."""
    convert: Convert
    fits: Callable[[Row], bool] = lambda row: True
    """Distinguishes formats with the same keys."""
    optional: tuple[str, ...] = ()
    """Further keys that it reads where a row has them."""
    leaves_out: str = ""
    """Why a row may give no record without being bad."""

    def matches(self, row: Row) -> bool:
        return all(row.get(key) is not None for key in self.keys) and self.fits(row)


_OF_ALPACA = ("input", "system", "history")
_LABELS = ("label", "kto_tag")
"""TRL's name and LLaMA-Factory's."""


def _has_transcripts(row: Row) -> bool:
    return isinstance(row["chosen"], str) and ASSISTANT in row["chosen"]


def _has_conversations(row: Row) -> bool:
    return isinstance(row["chosen"], list)


def _has_instruction(row: Row) -> bool:
    return isinstance(row["instruction"], str) and bool(row["instruction"].strip())


_PAIRS = (
    Format("pairs", ("prompt", "chosen", "rejected"), from_pairs),
    Format("fairseq2", ("src", "tgt_chosen", "tgt_rejected"), from_fairseq2),
    Format("responses", ("prompt", "responses", "pairs"), from_responses),
    Format("sharegpt", ("conversations", "chosen", "rejected"), from_sharegpt, optional=("system",)),
    Format("orca", ("system", "question", "chosen", "rejected"), from_orca),
    Format("hh", ("chosen", "rejected"), from_hh, _has_transcripts),
    Format("pairs", ("chosen", "rejected"), from_pairs, _has_conversations),
    Format("alpaca", ("instruction", "chosen", "rejected"), from_alpaca, optional=_OF_ALPACA),
)
_OTHERS = (
    Format("openai", ("input", "preferred_output", "non_preferred_output"), from_openai),
    Format("torchtune", ("chosen_conversations", "rejected_conversations"), from_torchtune),
    Format("swift", ("messages", "rejected_response"), from_swift, optional=("system",)),
    Format(
        *("shp", ("history", "human_ref_A", "human_ref_B", "labels"), from_shp),
        optional=("score_A", "score_B", "score_ratio"),
        leaves_out=CLOSE_SCORES,
    ),
    Format("stack_exchange", ("question", "response_j", "response_k"), from_stack_exchange_pair),
    # Named only: answers alone begin alike, too, and are not told apart from it.
    Format("common_beginning", ("chosen", "rejected"), from_common_beginning, lambda row: False),
)
_RANKINGS = (
    ("stack_exchange", ("question", "answers"), read_stack_exchange),
    ("nectar", ("prompt", "answers"), read_nectar),
    ("ultrafeedback", ("instruction", "completions"), read_ultrafeedback),
)
PAIR_FORMATS = (
    *(*_PAIRS, *_OTHERS),
    *(Format(name, keys, every_pair(read), leaves_out=SAME_SCORES) for name, keys, read in _RANKINGS),
)
_SINGLE = (
    Format("alpaca", ("instruction", "input", "output"), from_alpaca_response, _has_instruction, _OF_ALPACA),
    Format("input_output", ("input", "output"), from_columns("input", "output")),
    Format("messages", ("messages",), from_messages, optional=("system",)),
    Format("messages", ("conversations",), from_messages, optional=("system",)),
    Format("alpaca", ("instruction", "output"), from_alpaca_response, optional=_OF_ALPACA),
    Format("question_answer", ("question", "answer"), from_columns("question", "answer")),
)
RESPONSE_FORMATS = (
    Format("prompt_response", ("prompt", "response"), from_columns("prompt", "response")),
    Format("prompt_completion", ("prompt", "completion"), from_columns("prompt", "completion")),
    Format("responses", ("prompt", "sft_target"), from_columns("prompt", "sft_target")),
    *(replace(f, convert=preferred(f.convert)) for f in _PAIRS if f.name not in ("responses", "alpaca")),
    *_SINGLE,
    Format("alpaca", ("instruction", "chosen", "rejected"), from_alpaca_response, optional=_OF_ALPACA),
    *(replace(f, convert=preferred(f.convert)) for f in _OTHERS),
    *(Format(name, keys, the_best(read)) for name, keys, read in _RANKINGS),
)
UNPAIRED_FORMATS = (
    *(
        Format("unpaired", ("prompt", name, label), labelled(from_columns("prompt", name), label))
        for name in ("completion", "response")
        for label in _LABELS
    ),
    *(
        replace(f, keys=(*f.keys, label), convert=labelled(f.convert, label))
        for f in _SINGLE
        for label in _LABELS
    ),
    *(
        replace(f, convert=both_labelled(f.convert), leaves_out=f.leaves_out or OF_BOTH_KINDS)
        for f in PAIR_FORMATS
    ),
)
_READS_PROMPT: Mapping[str, Convert] = {
    **dict.fromkeys(("prompt_response", "prompt_completion", "responses"), column_prompt("prompt")),
    "input_output": column_prompt("input"),
    "question_answer": column_prompt("question"),
    "messages": prompt_of_messages,
    "alpaca": alpaca_prompt,
}
"""Formats whose prompt is there without a response; of the others it follows from the responses."""
PROMPT_FORMATS = (
    *(replace(f, convert=_READS_PROMPT.get(f.name, without_responses(f.convert))) for f in RESPONSE_FORMATS),
    Format("prompt", ("prompt",), column_prompt("prompt")),
    Format("fairseq2", ("src",), column_prompt("src")),
    Format("alpaca", ("instruction",), alpaca_prompt, optional=_OF_ALPACA),
    # Named only: by their keys, labelled completions are prompt_completion or prompt_response here.
    *(replace(f, convert=column_prompt("prompt")) for f in UNPAIRED_FORMATS if f.name == "unpaired"),
)
FORMATS: Mapping[Kind, tuple[Format, ...]] = {
    "pair": PAIR_FORMATS,
    "response": RESPONSE_FORMATS,
    "unpaired": UNPAIRED_FORMATS,
    "prompt": PROMPT_FORMATS,
}


def named_format(name: str, kind: Kind, key: str = FORMAT_KEY) -> Format:
    """The format called ``name``: one of the table, or a custom function by dotted path.

    ``key`` is what the user names it with, for messages. Raises DataError with the known names, and UserError
    as ``own_format`` does.
    """
    if is_dotted(name):
        return own_format(name, kind, key)
    found = [f for f in FORMATS[kind] if f.name == name]
    if not found:
        raise DataError(
            f"{key}: {name!r} is no format of {_WANTED[kind]}; known are "
            f"{', '.join(format_names(kind))}; a custom function is "
            "named as module.function"
        )
    return replace(found[0], convert=lambda row: _of_fitting(found, row).convert(row))


def _of_fitting(formats: Sequence[Format], row: Row) -> Format:
    return next((each for each in formats if each.matches(row)), formats[0])


def own_format(path: str, kind: Kind, key: str = FORMAT_KEY) -> Format:
    """The user's function at ``path`` as a format: ``record -> mapping``.

    It takes one record as its file has it, a mapping, and returns a mapping with ``prompt``, ``chosen``,
    ``rejected`` (pairs), ``prompt``, ``response`` (single responses; of a pair, chosen is taken) or
    ``prompt``, ``completion``, ``label`` (labelled completions; of a pair, both are taken), text or chat
    messages. If it raises, or returns anything else, the record is reported as bad, with its position.

    Tokens and reference values are stored under the content that it returns, never under its name: if a
    changed function returns another text, that is another record, so nothing stale is read.

    Raises UserError if it does not import or cannot be called with one record.
    """
    try:
        function = find(path)
        require_call(function, path, "record")
    except OwnPartError as error:
        raise UserError(f"{key}: {error}") from error
    ours = [each for each in FORMATS[kind] if each.name in _OWN[kind]]
    keys = " or ".join(", ".join(next(f.keys for f in ours if f.name == name)) for name in _OWN[kind])

    def convert(row: Row) -> Sequence[Record | BadRecord]:
        try:
            made = function(row)
        except Exception as error:
            # User code may raise anything; the report quotes it.
            raise BadRecord("format failed", f"{path} raises {type(error).__name__}: {error}") from error
        if not isinstance(made, Mapping):
            found = f"{path} must return a mapping with {keys}, but returned {describe(made)}"
            raise BadRecord("format failed", found)
        try:
            # What an id is made of; it may have keys, depths or circles that no file could have.
            json.dumps(made, sort_keys=True, default=str)
        except (ValueError, TypeError, RecursionError) as error:
            found = f"{path} must return what JSON can hold, but {type(error).__name__}: {error}"
            raise BadRecord("format failed", found) from error
        try:
            return _of_fitting(ours, made).convert(made)
        except BadRecord as fault:
            raise BadRecord(fault.reason, f"{fault.detail}, as {path} returns it") from fault

    return Format(path, (), convert)


def detect_format(row: Row, kind: Kind) -> Format | None:
    """The first format of the table that ``row``'s keys fit."""
    return next((f for f in FORMATS[kind] if f.matches(row)), None)


def read_columns(format: Format, kind: Kind) -> frozenset[str] | None:
    """The columns that a format of this name reads; None if that is unknown."""
    if not format.keys:
        return None
    same = [each for each in FORMATS[kind] if each.name == format.name]
    return frozenset(key for each in same for key in (*each.keys, *each.optional))


def nearest_format(row: Row, kind: Kind) -> tuple[Format, list[str]] | None:
    """Of the formats that lack some of their keys in ``row``, the one of which it has the largest share, and
    the keys that it lacks; None if ``row`` has no key of any."""

    def missing(format: Format) -> list[str]:
        return [key for key in format.keys if row.get(key) is None]

    lacking = [f for f in FORMATS[kind] if 0 < len(missing(f)) < len(f.keys)]
    nearest = min(lacking, key=lambda f: len(missing(f)) / len(f.keys), default=None)
    return None if nearest is None else (nearest, missing(nearest))


def describe_formats(kind: Kind) -> str:
    """The formats and the keys that each needs, for a message."""
    needs = {name: [f.keys for f in FORMATS[kind] if f.name == name] for name in format_names(kind)}
    return "; ".join(f"{name}: {' or '.join(map(', '.join, keys))}" for name, keys in needs.items())


def format_names(kind: Kind) -> list[str]:
    """What ``data.format`` may be."""
    return list(dict.fromkeys(f.name for f in FORMATS[kind]))


def known_columns(kind: Kind) -> list[str]:
    """The names that ``data.columns`` may map a file's columns to."""
    return list(dict.fromkeys(key for f in FORMATS[kind] for key in (*f.keys, *f.optional)))


_OWN: Mapping[Kind, tuple[str, ...]] = {
    "pair": ("pairs",),
    "response": ("prompt_response", "pairs"),
    "unpaired": ("unpaired", "pairs"),
    "prompt": ("prompt",),
}
"""Formats of what a custom function returns."""
_WANTED: Mapping[Kind, str] = {
    "pair": "preference pairs",
    "response": "single responses",
    "unpaired": "labelled completions",
    "prompt": "prompts",
}
