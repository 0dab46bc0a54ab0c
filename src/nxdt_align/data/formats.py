"""The formats of preference data, each converted to prompt and responses. No other module knows formats.

A format is one function, ``row -> records``, that raises BadRecord if the row does not fit. It is detected
from the row's keys (the first format of the table at the end that has them all) or named by ``data.format``,
which may also be the dotted path of a custom function. A key whose value is null counts as missing: Arrow
writes nulls for keys that other rows have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nxdt_align.config.fields import is_dotted
from nxdt_align.data.converters import (
    ASSISTANT,
    Convert,
    from_alpaca,
    from_alpaca_response,
    from_columns,
    from_common_beginning,
    from_fairseq2,
    from_hh,
    from_input_output,
    from_messages,
    from_orca,
    from_pairs,
    from_responses,
    from_sharegpt,
    from_unpaired,
    preferred,
)
from nxdt_align.data.records import BadRecord, DataError, Record, Row
from nxdt_align.errors import UserError
from nxdt_align.own_parts import OwnPartError, describe, find, require_call

Kind = Literal["pair", "response", "unpaired"]


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

    def matches(self, row: Row) -> bool:
        return all(row.get(key) is not None for key in self.keys) and self.fits(row)


def _has_transcripts(row: Row) -> bool:
    return isinstance(row["chosen"], str) and ASSISTANT in row["chosen"]


def _has_conversations(row: Row) -> bool:
    return isinstance(row["chosen"], list)


def _has_instruction(row: Row) -> bool:
    return isinstance(row["instruction"], str) and bool(row["instruction"].strip())


PAIR_FORMATS = (
    Format("pairs", ("prompt", "chosen", "rejected"), from_pairs),
    Format("fairseq2", ("src", "tgt_chosen", "tgt_rejected"), from_fairseq2),
    Format("responses", ("prompt", "responses", "pairs"), from_responses),
    Format("sharegpt", ("conversations", "chosen", "rejected"), from_sharegpt),
    Format("orca", ("system", "question", "chosen", "rejected"), from_orca),
    Format("hh", ("chosen", "rejected"), from_hh, _has_transcripts),
    Format("pairs", ("chosen", "rejected"), from_pairs, _has_conversations),
    Format("alpaca", ("instruction", "chosen", "rejected"), from_alpaca, optional=("input",)),
    # Named only: answers alone begin alike, too, and are not told apart from it.
    Format("common_beginning", ("chosen", "rejected"), from_common_beginning, lambda row: False),
)
RESPONSE_FORMATS = (
    Format("prompt_response", ("prompt", "response"), from_columns("prompt", "response")),
    Format("prompt_completion", ("prompt", "completion"), from_columns("prompt", "completion")),
    Format("responses", ("prompt", "sft_target"), from_columns("prompt", "sft_target")),
    *(
        replace(f, convert=preferred(f.convert))
        for f in PAIR_FORMATS
        if f.name not in ("responses", "alpaca")
    ),
    Format("alpaca", ("instruction", "input", "output"), from_alpaca_response, _has_instruction),
    Format("input_output", ("input", "output"), from_input_output),
    Format("messages", ("messages",), from_messages),
    Format("messages", ("conversations",), from_messages),
    Format("alpaca", ("instruction", "output"), from_alpaca_response, optional=("input",)),
    Format("alpaca", ("instruction", "chosen", "rejected"), from_alpaca_response, optional=("input",)),
)
UNPAIRED_FORMATS = (Format("unpaired", ("prompt", "completion", "label"), from_unpaired),)
FORMATS: Mapping[Kind, tuple[Format, ...]] = {
    "pair": PAIR_FORMATS,
    "response": RESPONSE_FORMATS,
    "unpaired": UNPAIRED_FORMATS,
}


def named_format(name: str, kind: Kind) -> Format:
    """The format called ``name``: one of the table, or a custom function by dotted path.

    Raises DataError with the known names, and UserError as ``own_format`` does.
    """
    if is_dotted(name):
        return own_format(name, kind)
    found = next((f for f in FORMATS[kind] if f.name == name), None)
    if found is None:
        names = ", ".join(dict.fromkeys(f.name for f in FORMATS[kind]))
        raise DataError(
            f"data.format: {name!r} is no format of {_WANTED[kind]}; known are {names}; a custom function is "
            "named as module.function"
        )
    return found


def own_format(path: str, kind: Kind) -> Format:
    """The user's function at ``path`` as a format: ``record -> mapping``.

    It takes one record as its file has it, a mapping, and returns a mapping with ``prompt``, ``chosen``,
    ``rejected`` (pairs), ``prompt``, ``response`` (single responses; of a pair, chosen is taken) or
    ``prompt``, ``completion``, ``label`` (labelled completions), text or chat messages. If it raises,
    or returns anything else, the record is reported as bad, with its position.

    Tokens and reference values are stored under the content that it returns, never under its name: if a
    changed function returns another text, that is another record, so nothing stale is read.

    Raises UserError if it does not import or cannot be called with one record.
    """
    try:
        function = find(path)
        require_call(function, path, "record")
    except OwnPartError as error:
        raise UserError(f"data.format: {error}") from error
    ours = [each for each in FORMATS[kind] if each.name in ("pairs", "prompt_response", "unpaired")]
    keys = " or ".join(dict.fromkeys(", ".join(each.keys) for each in ours if "prompt" in each.keys))

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
            return next((each for each in ours if each.matches(made)), ours[0]).convert(made)
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


def nearest_format(row: Row, kind: Kind) -> tuple[str, list[str]]:
    """Of the formats that lack a key in ``row``, the one of which it has the largest share, and the keys that
    it lacks."""

    def missing(format: Format) -> list[str]:
        return [key for key in format.keys if row.get(key) is None]

    lacking = [f for f in FORMATS[kind] if missing(f)]
    nearest = min(lacking, key=lambda f: len(missing(f)) / len(f.keys))
    return nearest.name, missing(nearest)


def describe_formats(kind: Kind) -> str:
    """The formats and their keys, for a message."""
    return "; ".join(
        f"{f.name}: {', '.join((*f.keys, *(f'{key} if any' for key in f.optional)))}" for f in FORMATS[kind]
    )


def known_columns(kind: Kind) -> list[str]:
    """The names that ``data.columns`` may map a file's columns to."""
    return list(dict.fromkeys(key for f in FORMATS[kind] for key in (*f.keys, *f.optional)))


_WANTED: Mapping[Kind, str] = {
    "pair": "preference pairs",
    "response": "single responses",
    "unpaired": "labelled completions",
}
