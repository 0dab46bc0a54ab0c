"""Tokenized records in their order, and their cache on disk by content."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from nxdt_align.data.records import BAD_RECORDS_ADVICE, BadRecord, BadRecords, DataError, OnBadRecord, Record
from nxdt_align.data.token_columns import (
    BROKEN,
    Stream,
    TokenColumns,
    TokenFile,
    map_tokens,
    write_tokens,
)
from nxdt_align.data.tokenize import RULES_VERSION, Encoded, Example, Tokenization, Truncation, changed_id
from nxdt_align.files import explain
from nxdt_align.record_ids import ID_BYTES, Array, as_bytes, spans

log = logging.getLogger(__name__)
CUT_SHARE, ENOUGH = 0.03, 0.99
"""From which share of examples on truncation is worth a warning, and the share that its advice serves."""
CHUNK = 1000
"""Records per call of the tokenizer."""


class TokenizedSet:
    """Tokenized records in their order; records of equal content share their tokens.

    Args:
        parts: the tokens, of one file of the cache or of several.
        rows: (N,) the record of each example, counted through all parts; None: each record once.
        desirable: (N,) bool, the labels of labelled completions; None: all are.
    """

    def __init__(
        self, parts: Sequence[TokenColumns], rows: Array | None = None, desirable: Array | None = None
    ) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part.ids) for part in parts)])
        self._rows = rows
        self._desirable = desirable
        self._count = int(self._starts[-1]) if rows is None else len(rows)
        self.prompt_lengths: Array = self._column("prompt_lengths")
        """(N,) int32, tokens."""
        self.response_lengths: Array = self._column("response_lengths")
        """(N, k) int32, tokens; k is 2 for pairs (chosen, rejected), otherwise 1."""
        self.truncated = int(self._column("truncated").sum())
        """Number of truncated examples."""
        self.identical_after_truncation = int(self._column("identical").sum())
        """Number of pairs whose chosen and rejected tokens are equal although their texts differ. They are
        kept: their margin is always 0."""

    @classmethod
    def of(
        cls, columns: TokenColumns, record_ids: Sequence[str], desirable: Sequence[bool] | None = None
    ) -> TokenizedSet:
        """The examples of these records, in this order."""
        row_of = {each.tobytes().hex(): row for row, each in enumerate(columns.ids)}
        rows = np.array([row_of[record] for record in record_ids], dtype=np.int64)
        return cls([columns], rows, None if desirable is None else np.array(desirable, dtype=bool))

    @property
    def record_ids(self) -> list[str]:
        """The content hash of each record, (N); another for those whose tokens later rules changed."""
        return [each for span in spans(len(self)) for each in self.ids_of(span)]

    def ids_of(self, span: slice) -> list[str]:
        """The ``record_ids`` of a part of the examples."""
        return self.text_of_ids(span).split()

    def text_of_ids(self, span: slice) -> str:
        """``ids_of``, parted by spaces."""
        text = self._column("ids", span).tobytes().hex(" ", ID_BYTES)
        changed = np.flatnonzero(self._column("changed", span))
        if not len(changed):
            return text
        found = text.split()
        for at in changed.tolist():
            found[at] = changed_id(found[at])
        return " ".join(found)

    def ids(self) -> Array:
        """(N, 16) uint8: ``record_ids`` as bytes."""
        if not any(part.changed.any() for part in self._parts):
            return self._column("ids")
        return np.concatenate([as_bytes(self.ids_of(span)) for span in spans(len(self))])

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the files that it is mapped from, which all processes of a machine share."""
        return sum(part.path.stat().st_size for part in self._parts if part.path is not None)

    @property
    def own_bytes(self) -> int:
        """Bytes that each process holds."""
        held = [array for part in self._parts if part.path is None for array in part.arrays().values()]
        listed = (self._rows, self._desirable)
        held += [array for array in listed if array is not None and not isinstance(array, np.memmap)]
        is_mapped = self._rows is None and len(self._parts) == 1 and self._parts[0].path is not None
        if not is_mapped:
            held += [self.prompt_lengths, self.response_lengths]
        return sum(array.nbytes for array in held)

    def ends(self, seq_length: int) -> list[int]:
        """The tokens that responses end with, EOS or a template's end of turn, those cut short at
        ``seq_length`` left out."""
        found: set[int] = set()
        for span in spans(len(self)):
            lengths = self._column("prompt_lengths", span)[:, None] + self._column("response_lengths", span)
            found.update(np.unique(self._column("last_tokens", span)[lengths < seq_length]).tolist())
        return sorted(found)

    def warnings_of_truncation(self, truncation: Truncation, prompt_key: str) -> list[str]:
        """What truncation takes from more than a few examples, and the lengths that would do.

        Args:
            truncation: the one that made these tokens.
            prompt_key: the key of its ``max_prompt_length``.
        """
        if self.truncated <= CUT_SHARE * len(self):
            return []
        if any(not len(part.whole_lengths) and part.truncated.any() for part in self._parts):
            cut = f"{prompt_key} and data.seq_length cut {_share(self.truncated, len(self))}"
            return [f"{cut}; by how much, the token cache of an earlier version does not say"]
        whole = self._column("whole_lengths")
        limit, seq_length = truncation.prompt_limit, truncation.seq_length
        prompts = np.minimum(whole[:, 0], limit)
        lengths = prompts + whole[:, 1:].max(1)
        found = []
        for key, value, over, needed in (
            (prompt_key, limit, whole[:, 0] > limit, whole[:, 0]),
            ("data.seq_length", seq_length, lengths > seq_length, lengths),
        ):
            if over.mean() > CUT_SHARE:
                part = "the prompts" if key == prompt_key else truncation.cuts_of_sequences
                enough = int(np.quantile(needed, ENOUGH, method="inverted_cdf"))
                more = f", and data.seq_length above it (it is {seq_length:,})" if key == prompt_key else ""
                found.append(
                    f"{key} ({value:,}) cuts {part} of {_share(int(over.sum()), len(self))}: {enough:,} "
                    f"would do for {ENOUGH:.0%} of them{more if enough >= seq_length else ''}"
                )
        return found

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if not -self._count <= index < self._count:
            raise IndexError(index)
        row = index % self._count if self._rows is None else int(self._rows[index])
        which = 0 if len(self._parts) == 1 else int(np.searchsorted(self._starts, row, "right")) - 1
        part, row = self._parts[which], row - int(self._starts[which])
        desirable = True if self._desirable is None else bool(self._desirable[index])
        return Example(part.record_id(row), part.prompt(row), part.responses(row), desirable)

    def apart(self, index: int) -> Example:
        """The example, prompt and responses apart, whatever counts as response in training."""
        return TokenizedSet.__getitem__(self, index)

    def _column(self, name: str, span: slice | None = None) -> Array:
        """An array of the parts, by example; of one part whose records occur once each, no copy."""
        span = span or slice(0, self._count)
        columns = [
            part.lengths_before_truncation() if name == "whole_lengths" else getattr(part, name)
            for part in self._parts
        ]
        if len(columns) == 1:
            only: Array = columns[0]
            return only[span] if self._rows is None else only[self._rows[span]]
        rows = np.arange(span.start, span.stop) if self._rows is None else self._rows[span]
        which = np.searchsorted(self._starts, rows, "right") - 1
        found = np.empty((len(rows), *columns[0].shape[1:]), columns[0].dtype)
        for at in np.unique(which).tolist():
            mine = which == at
            found[mine] = columns[at][rows[mine] - self._starts[at]]
        return found


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} examples ({count / total:.0%})"


class WholeSequences(TokenizedSet):
    """Single responses that count all prompt tokens but the first as response.

    So supervised fine-tuning trains on every predictable token. No token is added or lost.
    """

    def __init__(self, examples: TokenizedSet) -> None:
        super().__init__(examples._parts, examples._rows, examples._desirable)
        self.response_lengths = self.response_lengths + self.prompt_lengths[:, None] - 1
        # One number for all: no memory per example.
        self.prompt_lengths = np.broadcast_to(np.ones(1, np.int32), (len(self),))

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        whole = tuple(np.concatenate([example.prompt[1:], response]) for response in example.responses)
        return replace(example, prompt=example.prompt[:1], responses=whole)


def tokenize_records(
    records: Sequence[Record],
    tokenization: Tokenization,
    cache_dir: Path | None,
    *,
    report: BadRecords | None = None,
    on_bad_record: OnBadRecord = "error",
) -> TokenizedSet:
    """Tokenize all records, equal ones once, or read the tokens that an earlier run cached in ``cache_dir``.

    Records that have no tokens, such as those that the chat template refuses, are bad records like those of
    ``load_records``, whose ``report`` they are added to.

    Raises DataError for bad records (``error``, or where a source has no other), as Tokenization does, and if
    the cache folder is not writable.
    """
    distinct = {record.id: record for record in records}
    if not distinct:
        raise DataError("there are no records to tokenize")
    ids = list(distinct)
    as_before = cache_dir is None or all(map(tokenization.as_before, distinct.values()))
    path = None if cache_dir is None else cache_path(cache_dir, tokenization, as_before, as_bytes(ids))
    cached = None if path is None else read_tokens(path, ids)
    columns, refused, unread = cached or _encode_all(list(distinct.values()), tokenization)
    if refused:
        _report_refused(records, refused, report or BadRecords(read=len(records)), on_bad_record)
        records = [record for record in records if record.id not in refused]
    assert columns is not None
    if path is not None and cached is None:
        save_tokens(path, columns.arrays(), refused, unread)
    tell_unread_keys(unread)
    labels = [record.label is not False for record in records]
    result = TokenizedSet.of(columns, [record.id for record in records], labels)
    tell_identical(result)
    return result


def tell_unread_keys(unread: Mapping[str, int]) -> None:
    for key, count in unread.items():
        log.warning(
            "`%s`, which %s%d records have, is not read: the chat template's output is the same "
            "without it, and so is training",
            *(key, "" if key == "tools" else "messages of ", count),
        )


def tell_identical(examples: TokenizedSet) -> None:
    if examples.identical_after_truncation:
        log.warning(
            "%d of %d pairs have the same tokens as chosen and as rejected once truncated and tokenized",
            examples.identical_after_truncation,
            len(examples),
        )


def _encode_all(
    records: list[Record], tokenization: Tokenization
) -> tuple[TokenColumns | None, dict[str, BadRecord], Counter[str]]:
    """The tokens of the good records, if there are any; the faults of the others by their ids; and keys that
    nothing reads, with the number of good records whose messages have them."""
    good: dict[str, Encoded] = {}
    refused: dict[str, BadRecord] = {}
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        for record, encoded in zip(chunk, tokenization.encode(chunk), strict=True):
            if isinstance(encoded, BadRecord):
                refused[record.id] = encoded
            else:
                good[record.id] = encoded
    if not good:
        return None, refused, Counter()
    columns = TokenColumns.of(list(good), list(good.values()))
    return columns, refused, Counter(chain.from_iterable(each.unread for each in good.values()))


def _report_refused(
    records: Sequence[Record],
    refused: Mapping[str, BadRecord],
    report: BadRecords,
    on_bad_record: OnBadRecord,
) -> None:
    """Add the refused records to the report, each place once, however often a mixture repeats it.

    Raises DataError under ``error``, and where a source has no other record.
    """
    for place, record_id in dict.fromkeys((record.source, record.id) for record in records):
        if record_id in refused:
            report.add(place, refused[record_id])
    usable = {_file_of(record) for record in records if record.id not in refused}
    unusable = [path for path in dict.fromkeys(map(_file_of, records)) if path not in usable]
    if unusable:
        raise DataError(
            f"{report.summary()}\nno record of {', '.join(unusable)} can be used with this tokenizer and its "
            "chat template; use those of another model, or give prompt and responses as text"
        )
    if on_bad_record == "error":
        raise DataError(f"{report.summary()}\n{BAD_RECORDS_ADVICE}")


def _file_of(record: Record) -> str:
    return record.source.rpartition(":")[0]


# The cache

_NO_LONGER_REFUSED = "no common beginning in the chat template"
"""For what earlier versions refused conversations that have tokens now, such as DeepSeek-R1's."""


def cache_path(cache_dir: Path, tokenization: Tokenization, as_before: bool, ids: Array) -> Path:
    """The cache file of these distinct records, (N, 16) uint8, under this tokenization, named by content
    only.

    Its name has the rules' version, except where all of them have the same tokens under the first one
    (``as_before``): what an earlier version cached of those is used, and of no others.
    """
    fingerprint = tokenization.fingerprint() + ("" if as_before else f" rules {RULES_VERSION}")
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    for span in spans(len(ids)):
        digest.update(b"\n" + ids[span].tobytes().hex("\n", ID_BYTES).encode())
    return cache_dir / f"tokens-{digest.hexdigest()}.npz"


def read_tokens(path: Path, record_ids: list[str]) -> TokenFile | None:
    """What ``_encode_all`` found, cached at ``path``; None if there is no file, or, with a warning, if it is
    broken."""
    if not path.exists():
        return None
    try:
        found = map_tokens(path, trusted=False)
        if any(fault.reason == _NO_LONGER_REFUSED for fault in found.refused.values()):
            return None
        wanted = "".join(record for record in record_ids if record not in found.refused)
        if found.columns.ids.tobytes() == bytes.fromhex(wanted):
            return found
        reason = "its arrays are inconsistent"
    except BROKEN as error:
        reason = str(error)
    log.warning("the token cache %s is broken (%s): tokenizing again", path, reason)
    return None


def save_tokens(
    path: Path,
    arrays: Mapping[str, Array | Stream],
    refused: Mapping[str, BadRecord],
    unread: Mapping[str, int],
) -> None:
    """Write atomically. Raises DataError if the folder is not writable."""
    try:
        write_tokens(path, arrays, refused, unread)
    except OSError as error:
        raise DataError(
            f"the token cache {path} cannot be written (data.cache_dir): {explain(error)}"
        ) from error
