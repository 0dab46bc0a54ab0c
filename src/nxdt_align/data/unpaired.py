"""Unpaired records: each completion gets a mismatched one, which KTO estimates a divergence from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from nxdt_align.data.files import DataError
from nxdt_align.data.record_types import Record, UnpairedRecord


def with_mismatched(records: Sequence[Record]) -> list[Record]:
    """The records, each with the completion of the one before it (the first: the last one's).

    TRL rotates completions by one inside batches; here it is the whole data set, so that the pairing,
    and with it a stored reference value, does not depend on the batch size. Completions of the same
    prompt and equal ones are passed over. Raises DataError where a record is left without one.
    """
    found: list[Record] = []
    for i, record in enumerate(records):
        assert isinstance(record, UnpairedRecord)
        others = (records[i - k] for k in range(1, len(records)))
        before = next((other.responses[0] for other in others if _is_mismatched(record, other)), None)
        if before is None:
            raise DataError(
                f"{record.source}: KTO needs another prompt's completion beside each, but no other prompt of "
                "the data has another completion; its KL term is estimated from such pairs"
            )
        digest = hashlib.blake2b(f"{record.id}{before}".encode(), digest_size=16).hexdigest()
        found.append(replace(record, id=digest, mismatched=before))
    return found


def _is_mismatched(record: Record, other: Record) -> bool:
    return other.responses[0] != record.responses[0] and other.prompt != record.prompt
