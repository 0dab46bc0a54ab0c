"""Large data, prepared once per machine: tokenized in parts by several processes into one file per source,
which every rank maps, and found again by the next run without reading the source; see preparation.py.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nxdt_align.data.mismatched_parts import Mixture, PreparedMixture
from nxdt_align.data.preparation import PreparedSources, Ready, Settings
from nxdt_align.data.reading import ReadPart, Source, check_weight, conclude, tell_unread, weighted_rows
from nxdt_align.data.records import BAD_RECORDS_ADVICE, BadRecords, DataError, OnBadRecord
from nxdt_align.data.source_identity import Stamp
from nxdt_align.data.sources import is_dataset_id
from nxdt_align.data.token_columns import TokenColumns
from nxdt_align.data.token_sets import TokenizedSet, tell_identical, tell_unread_keys
from nxdt_align.messages import NOTICE
from nxdt_align.record_ids import Array

log = logging.getLogger(__name__)
LARGE = 2**22
"""Bytes of data from which on they are prepared so: smaller ones are read and hashed well within a second."""
PACKED, UNPACKS_TO = (".gz", ".parquet"), 10
"""Files whose bytes count this many times. Text packs to a third or a quarter, records that repeat a prompt
or a template to a tenth: so no data of several times ``LARGE`` are taken for small."""


def is_large(sources: Sequence[Source]) -> bool:
    """Whether the sources are files and together of at least ``LARGE`` bytes; says so where they would be but
    for one of the Hub."""
    try:
        found = {path: Stamp.of(path) for path in {source.path for source in sources}}
    except OSError:
        return False  # what reads them says why
    size = sum(_unpacked(stamp) for stamp in found.values() if stamp is not None)
    elsewhere = [path for path, stamp in found.items() if stamp is None]
    if size >= LARGE and elsewhere and all(is_dataset_id(path) for path in elsewhere):
        log.log(
            NOTICE,
            "%s is no file here: the whole mixture is held in the memory of every process, not prepared once "
            "per machine; save it with `datasets`' save_to_disk and name that folder",
            ", ".join(sorted(elsewhere)),
        )
    return size >= LARGE and not elsewhere


def _unpacked(stamp: Stamp) -> int:
    """Bytes that a source may unpack to."""
    return stamp.size * (UNPACKS_TO if stamp.path.lower().endswith(PACKED) else 1)


def prepared_examples(
    sources: Sequence[Source],
    settings: Settings,
    cache_dir: Path,
    *,
    on_bad_record: OnBadRecord,
    seed: int,
) -> tuple[TokenizedSet, BadRecords]:
    """The examples of the sources, as ``load_records`` and ``tokenize_records`` give them, and the report of
    bad records. Each source is prepared where it is not yet, by the first process that gets to it; others
    wait.

    Raises DataError as those two do, and where the cache folder cannot be written.
    """
    for source in sources:
        check_weight(source)
    ready = PreparedSources(settings, cache_dir).ready(list({source.path: None for source in sources}))
    report = BadRecords()
    parts, rows, start = [], [], 0
    for index, source in enumerate(sources):
        found = ready[source.path]
        report.merge(found.report)
        parts.append(found.columns)
        rows.append(_rows_of(found, source, [seed, index], start))
        start += len(found.columns.ids)
    _tell({path: found.about for path, found in ready.items()}, [each.about for each in ready.values()])
    if report.total and on_bad_record == "error":
        raise DataError(f"{report.summary()}\n{BAD_RECORDS_ADVICE}")
    ordered = None if all(each is None for each in rows) else _concatenated(rows, parts)
    examples = TokenizedSet(parts, ordered)
    tell_identical(examples)
    return examples, report


def prepared_mismatched(
    sources: Sequence[Source],
    settings: Settings,
    cache_dir: Path,
    *,
    on_bad_record: OnBadRecord,
    seed: int,
) -> tuple[TokenizedSet, BadRecords]:
    """As ``prepared_examples``, of labelled completions that each get another one, as ``with_mismatched``
    gives it. They are prepared anew where a source is added or has another weight."""
    for source in sources:
        check_weight(source)
    mixture = Mixture(tuple(sources), seed)
    found = PreparedMixture(settings, cache_dir).ready([mixture])[mixture]
    _tell(found.about["sources"], [found.about])
    if found.report.total and on_bad_record == "error":
        raise DataError(f"{found.report.summary()}\n{BAD_RECORDS_ADVICE}")
    rows, labels = found.rows, found.labels
    if rows is not None and (rows < 0).any():
        assert labels is not None
        rows, labels = rows[rows >= 0], labels[rows >= 0]
    examples = TokenizedSet([found.columns], rows, labels)
    tell_identical(examples)
    return examples, found.report


def _rows_of(found: Ready, source: Source, seed: list[int], start: int) -> Array | None:
    """(n,) rows of a source's examples among those of all, by its weight; None: each of its rows once."""
    count = len(found.columns.ids) if found.rows is None else len(found.rows)
    chosen = weighted_rows(count, source, seed)
    if found.rows is not None:
        chosen = found.rows if chosen is None else found.rows[chosen]
        chosen = chosen[chosen >= 0]
    return None if chosen is None else chosen + start


def _concatenated(rows: Sequence[Array | None], parts: Sequence[TokenColumns]) -> Array:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    whole = [
        np.arange(start, start + len(part.ids)) if own is None else own
        for own, part, start in zip(rows, parts, starts[:-1].tolist(), strict=True)
    ]
    return np.concatenate(whole).astype(np.int32 if starts[-1] < 2**31 else np.int64)


def _tell(sources: Mapping[str, Mapping[str, Any]], tokens: Sequence[Mapping[str, Any]]) -> None:
    """What is kept beside the tokens of sources that a user should know."""
    for path, about in sources.items():
        part = ReadPart([], Counter(about["unread"]), about["rows"], about["left_out"], about["texts"])
        conclude(path, part, about["records"], about["leaves_out"])
        if part.unread:
            tell_unread(path, part.unread)
    keys: Counter[str] = Counter()
    for about in tokens:
        keys.update(about["unread_keys"])
    tell_unread_keys(keys)
