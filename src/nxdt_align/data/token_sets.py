"""Tokenized records in a few flat arrays, and their cache on disk by content."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nxdt_align.data.records import BAD_RECORDS_ADVICE, BadRecord, BadRecords, DataError, OnBadRecord, Record
from nxdt_align.data.tokenize import RULES_VERSION, Encoded, Example, Tokenization, Truncation, changed_id
from nxdt_align.files import atomic_write, explain

log = logging.getLogger(__name__)
CUT_SHARE, ENOUGH = 0.03, 0.99
"""From which share of examples on truncation is worth a warning, and the share that its advice serves."""
CHUNK = 1000
"""Records per call of the tokenizer."""


class TokenizedSet:
    """Tokenized records in their order; records of equal content share their tokens."""

    def __init__(
        self, columns: TokenColumns, record_ids: Sequence[str], desirable: Sequence[bool] | None = None
    ) -> None:
        row_of = {record: row for row, record in enumerate(columns.record_ids)}
        self._columns = columns
        self._rows = np.array([row_of[record] for record in record_ids], dtype=np.int64)
        self._desirable = None if desirable is None else list(desirable)
        changed = {r for r, is_changed in zip(columns.record_ids, columns.changed, strict=True) if is_changed}
        self.record_ids = [changed_id(r) if r in changed else r for r in record_ids]
        """The content hash of each record, (N); another for those whose tokens later rules changed."""
        self.prompt_lengths: npt.NDArray[Any] = np.diff(columns.prompt_offsets)[self._rows]
        """(N,) int64, tokens."""
        lengths = np.diff(columns.response_offsets).reshape(len(columns.record_ids), -1)
        self.response_lengths: npt.NDArray[Any] = lengths[self._rows]
        """(N, k) int64, tokens; k is 2 for pairs (chosen, rejected), otherwise 1."""
        self.truncated = int(columns.truncated[self._rows].sum())
        """Number of truncated examples."""
        self.identical_after_truncation = int(columns.identical_responses()[self._rows].sum())
        """Number of pairs whose chosen and rejected tokens are equal although their texts differ. They are
        kept: their margin is always 0."""

    def ends(self, seq_length: int) -> list[int]:
        """The tokens that responses end with, EOS or a template's end of turn, those cut short at
        ``seq_length`` left out."""
        whole = self.prompt_lengths[:, None] + self.response_lengths < seq_length
        stops = self._columns.response_offsets[1:].reshape(len(self._columns.record_ids), -1)[self._rows]
        return [int(token) for token in np.unique(self._columns.response_tokens[stops - 1][whole])]

    def warnings_of_truncation(self, truncation: Truncation, prompt_key: str) -> list[str]:
        """What truncation takes from more than a few examples, and the lengths that would do.

        Args:
            truncation: the one that made these tokens.
            prompt_key: the key of its ``max_prompt_length``.
        """
        if self.truncated <= CUT_SHARE * len(self):
            return []
        whole = self._columns.whole_lengths
        if not len(whole):
            cut = f"{prompt_key} and data.seq_length cut {_share(self.truncated, len(self))}"
            return [f"{cut}; by how much, the token cache of an earlier version does not say"]
        whole = whole[self._rows]
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
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self._rows[index])
        desirable = True if self._desirable is None else self._desirable[index]
        return Example(
            self.record_ids[index], self._columns.prompt(row), self._columns.responses(row), desirable
        )


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} examples ({count / total:.0%})"


class WholeSequences(TokenizedSet):
    """Single responses that count all prompt tokens but the first as response.

    So supervised fine-tuning trains on every predictable token. No token is added or lost.
    """

    def __init__(self, examples: TokenizedSet) -> None:
        self._columns, self._rows = examples._columns, examples._rows
        self._desirable = examples._desirable
        self.record_ids = examples.record_ids
        self.prompt_lengths = np.ones_like(examples.prompt_lengths)
        self.response_lengths = examples.response_lengths + examples.prompt_lengths[:, None] - 1
        self.truncated = examples.truncated
        self.identical_after_truncation = examples.identical_after_truncation

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
    path = None if cache_dir is None else _cache_of(cache_dir, tokenization, distinct)
    cached = None if path is None else load_columns(path, ids)
    columns, refused, unread = cached or _encode_all(list(distinct.values()), tokenization)
    if refused:
        _report_refused(records, refused, report or BadRecords(read=len(records)), on_bad_record)
        records = [record for record in records if record.id not in refused]
    assert columns is not None
    if path is not None and cached is None:
        save_columns(path, columns, refused, unread)
    for key, count in unread.items():
        log.warning(
            "`%s`, which %s%d records have, is not read: the chat template's output is the same "
            "without it, and so is training",
            *(key, "" if key == "tools" else "messages of ", count),
        )
    labels = [record.label is not False for record in records]
    result = TokenizedSet(columns, [record.id for record in records], labels)
    if result.identical_after_truncation:
        log.warning(
            "%d of %d pairs have the same tokens as chosen and as rejected once truncated and tokenized",
            result.identical_after_truncation,
            len(result),
        )
    return result


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


# Columns


@dataclass(frozen=True)
class TokenColumns:
    """U records of k responses each. Tokens are concatenated; ``offsets[i]:offsets[i + 1]`` is the i-th."""

    record_ids: list[str]
    """(U), content hashes, each once."""
    prompt_tokens: npt.NDArray[Any]
    """int32"""
    prompt_offsets: npt.NDArray[Any]
    """(U + 1,) int64"""
    response_tokens: npt.NDArray[Any]
    """int32"""
    response_offsets: npt.NDArray[Any]
    """(U * k + 1,) int64; a record's responses are neighbours."""
    truncated: npt.NDArray[Any]
    """(U,) bool"""
    changed: npt.NDArray[Any]
    """(U,) bool: an earlier version of the rules gave it other tokens."""
    whole_lengths: npt.NDArray[Any]
    """(U, 1 + k) int32: tokens of the prompt and of the responses before truncation. (0, 1 + k) where nothing
    was truncated, or an earlier version did not note them."""

    @classmethod
    def of(cls, record_ids: list[str], encoded: Sequence[Encoded]) -> TokenColumns:
        """The columns of U records of k responses each."""
        flat = [tokens for each in encoded for tokens in each.responses]
        cut = any(each.truncated for each in encoded)
        return cls(
            record_ids,
            *_flatten([each.prompt for each in encoded]),
            *_flatten(flat),
            truncated=np.array([each.truncated for each in encoded], dtype=bool),
            changed=np.array([each.changed for each in encoded], dtype=bool),
            whole_lengths=np.array([each.whole for each in encoded if cut], dtype=np.int32).reshape(
                -1, 1 + len(encoded[0].responses)
            ),
        )

    @property
    def responses_per_record(self) -> int:
        return (len(self.response_offsets) - 1) // len(self.record_ids)

    def prompt(self, row: int) -> npt.NDArray[Any]:
        return self.prompt_tokens[self.prompt_offsets[row] : self.prompt_offsets[row + 1]]

    def responses(self, row: int) -> tuple[npt.NDArray[Any], ...]:
        k = self.responses_per_record
        bounds = self.response_offsets[row * k : (row + 1) * k + 1]
        return tuple(self.response_tokens[a:b] for a, b in pairwise(bounds))

    def identical_responses(self) -> npt.NDArray[Any]:
        """(U,) bool: the two responses of a pair are the same tokens. False where k is 1."""
        result = np.zeros(len(self.record_ids), dtype=bool)
        if self.responses_per_record == 2:
            lengths = np.diff(self.response_offsets).reshape(-1, 2)
            for row in np.flatnonzero(lengths[:, 0] == lengths[:, 1]):
                chosen, rejected = self.responses(int(row))
                result[row] = np.array_equal(chosen, rejected)
        return result

    def is_whole(self) -> bool:
        """Whether the arrays are consistent, which a file on disk may not be."""
        count = len(self.record_ids)
        return (
            count > 0
            and self.truncated.shape == self.changed.shape == (count,)
            and len(self.whole_lengths) in (0, count)
            and self.prompt_offsets.shape == (count + 1,)
            and self.response_offsets.shape in ((count + 1,), (2 * count + 1,))
            and _fit(self.prompt_tokens, self.prompt_offsets)
            and _fit(self.response_tokens, self.response_offsets)
        )


def _flatten(sequences: Sequence[Sequence[int]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(tokens) for tokens in sequences], out=offsets[1:])
    flat = np.fromiter((t for tokens in sequences for t in tokens), dtype=np.int32, count=int(offsets[-1]))
    return flat, offsets


def _fit(tokens: npt.NDArray[Any], offsets: npt.NDArray[Any]) -> bool:
    kinds = tokens.dtype == np.int32 and tokens.ndim == 1 and offsets.dtype == np.int64
    return bool(kinds and offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) > 0).all())


# The cache

_LATER = ("changed", "whole_lengths")
"""Arrays that a file has only where they say anything, and that earlier versions did not write."""
_REFUSED, _UNREAD = "refused", "unread"
_NO_LONGER_REFUSED = "no common beginning in the chat template"
"""For what earlier versions refused conversations that have tokens now, such as DeepSeek-R1's."""
"""(R, 3) text, id, reason and detail of each record that has no tokens; (K, 2) text, keys of messages that
nothing reads and the number of records that have them."""


def _cache_of(cache_dir: Path, tokenization: Tokenization, records: Mapping[str, Record]) -> Path:
    """The cache file of these records. Its name has the rules' version, except where all of them have the
    same tokens under the first one: what an earlier version cached of those is used, and of no others."""
    fingerprint = tokenization.fingerprint()
    if not all(map(tokenization.as_before, records.values())):
        fingerprint += f" rules {RULES_VERSION}"
    return cache_path(cache_dir, fingerprint, list(records))


def cache_path(cache_dir: Path, fingerprint: str, record_ids: Sequence[str]) -> Path:
    """The cache file of these records under this tokenization, named by content only."""
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    for record in record_ids:
        digest.update(b"\n" + record.encode())
    return cache_dir / f"tokens-{digest.hexdigest()}.npz"


def load_columns(
    path: Path, record_ids: list[str]
) -> tuple[TokenColumns, dict[str, BadRecord], Counter[str]] | None:
    """What ``_encode_all`` found, cached at ``path``; None if there is no file, or, with a warning, if it is
    broken."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = {f.name: arrays[f.name] for f in fields(TokenColumns) if f.name not in _LATER}
            values |= {name: arrays.get(name) for name in _LATER}
            faults, keys = (arrays[n].tolist() if n in arrays else [] for n in (_REFUSED, _UNREAD))
        ids = values.pop("record_ids").tolist()
        if values["changed"] is None:
            values["changed"] = np.zeros(len(ids), dtype=bool)
        if values["whole_lengths"] is None:
            values["whole_lengths"] = np.zeros((0, 2), dtype=np.int32)
        columns = TokenColumns(ids, **values)
        refused = {record: BadRecord(reason, detail) for record, reason, detail in faults}
        if any(fault.reason == _NO_LONGER_REFUSED for fault in refused.values()):
            return None
        if ids == [record for record in record_ids if record not in refused] and columns.is_whole():
            return columns, refused, Counter({key: int(count) for key, count in keys})
        reason = "its arrays are inconsistent"
    # RuntimeError: a header that now asks for a password, or for a method that there is none for.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error)
    log.warning("the token cache %s is broken (%s): tokenizing again", path, reason)
    return None


def save_columns(
    path: Path, columns: TokenColumns, refused: Mapping[str, BadRecord], unread: Counter[str]
) -> None:
    """Write atomically. Raises DataError if the folder is not writable."""
    buffer = io.BytesIO()
    # Both are left out where there is nothing to keep: the file is then what earlier versions wrote and read.
    values = {f.name: getattr(columns, f.name) for f in fields(columns)}
    values = {name: value for name, value in values.items() if name not in _LATER or value.any()}
    if refused:
        values[_REFUSED] = np.array([(record, f.reason, f.detail) for record, f in refused.items()])
    if unread:
        values[_UNREAD] = np.array([(key, str(count)) for key, count in unread.items()])
    np.savez(buffer, **values)
    try:
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        raise DataError(
            f"the token cache {path} cannot be written (data.cache_dir): {explain(error)}"
        ) from error
