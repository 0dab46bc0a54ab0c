"""Which parts of a run's identity differ from those of an earlier run, in the user's terms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

HASHED = {
    "data": "the records of data.train_dir (their text, number or order)",
    "tokenization": "tokenizer or truncation (data.tokenizer, data.seq_length, max_prompt_length, "
    "truncation_mode)",
    "start": "start weights (exp_manager.resume_from_checkpoint, or the seed of random ones)",
}
"""Parts that are stored as a fingerprint -> their meaning."""
ORDER = ("seed", "data.global_batch_size")
"""Keys of the values of ``order``."""
PREFIXES = {"objective": "model_alignment_strategy", "model": ""}
ABSENT = "not there"


def differences(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, list[str]]:
    """Part of the identity -> its differences in words, with keys and both values where they are stored.

    ``earlier`` was read from JSON; ``present`` may hold any values that are written to it.
    """
    present = json.loads(json.dumps(present, default=str))
    parts = sorted(part for part in {*earlier, *present} if earlier.get(part) != present.get(part))
    return {part: list(_in_words(part, earlier.get(part), present.get(part))) for part in parts}


def _in_words(part: str, earlier: Any, present: Any) -> Iterator[str]:
    if part in HASHED:
        yield HASHED[part]
        return
    if part == "order" and isinstance(earlier, list) and isinstance(present, list):
        earlier, present = (dict(zip(ORDER, values, strict=False)) for values in (earlier, present))
        prefix = ""
    else:
        prefix = PREFIXES.get(part, part)
    old, new = dict(_leaves(prefix, earlier)), dict(_leaves(prefix, present))
    for key in sorted({*old, *new}):
        before, now = old.get(key, ABSENT), new.get(key, ABSENT)
        if before != now:
            yield f"{key} was {before} and is {now}"


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Dotted key -> value. A section that is null has no keys."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), item)
    elif value is not None:
        yield path, json.dumps(value)
