"""Unpaired records: each completion gets a mismatched one, which KTO estimates a divergence from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from nxdt_align.data.files import DataError
from nxdt_align.data.records import Record, UnpairedRecord


def with_mismatched(records: Sequence[Record]) -> list[Record]:
    """The records, each with the completion of the one before it (the first: the last one's).

    TRL rotates completions by one inside batches; here it is the whole data set, so that the pairing,
    and with it a stored reference value, does not depend on the batch size. Equal completions are passed
    over. Raises DataError where all completions are the same.
    """
    completions = [record.responses[0] for record in records]
    if len(set(completions)) < 2:
        raise DataError(
            f"KTO needs at least two different completions, but the data have {len(set(completions))}: a "
            "completion behind another prompt is what its KL term is estimated from"
        )
    found: list[Record] = []
    for i, record in enumerate(records):
        assert isinstance(record, UnpairedRecord)
        before = next(
            completions[i - k] for k in range(1, len(records)) if completions[i - k] != completions[i]
        )
        digest = hashlib.blake2b(f"{record.id}{before}".encode(), digest_size=16).hexdigest()
        found.append(replace(record, id=digest, mismatched=before))
    return found
