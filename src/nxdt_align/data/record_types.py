"""What every format becomes: records of pairs, of single responses, and of labelled completions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from nxdt_align.data.formats import Draft
from nxdt_align.data.values import Prompt


@dataclass(frozen=True)
class PairRecord:
    """A prompt, text or chat messages, with a preferred and a rejected response."""

    id: str
    """The content's hash: equal content, equal id, wherever it stands."""
    prompt: Prompt
    chosen: str
    rejected: str
    source: str
    """``file:line``, for messages."""

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class ResponseRecord:
    """A prompt, text or chat messages, with one response."""

    id: str
    prompt: Prompt
    response: str
    source: str

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.response,)


@dataclass(frozen=True)
class UnpairedRecord:
    """A prompt with one completion that is good or bad, and another prompt's completion."""

    id: str
    prompt: Prompt
    completion: str
    desirable: bool
    source: str
    mismatched: str = ""
    """See ``unpaired.with_mismatched``; empty before."""

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.completion, self.mismatched) if self.mismatched else (self.completion,)


Record = PairRecord | ResponseRecord | UnpairedRecord


def record_id(prompt: Prompt, responses: Sequence[str], label: bool | None = None) -> str:
    """The content's hash: 32 hex digits, blake2b over canonical JSON."""
    names = ("chosen", "rejected") if len(responses) == 2 else ("response",)
    content: dict[str, object] = {"prompt": prompt, **dict(zip(names, responses, strict=True))}
    if label is not None:
        content["label"] = label
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def to_record(draft: Draft, place: str) -> Record:
    """The record of a sound draft that stands at ``place``."""
    identifier = record_id(draft.prompt, draft.responses)
    if draft.label is not None:
        identifier = record_id(draft.prompt, draft.responses, draft.label)
        return UnpairedRecord(identifier, draft.prompt, draft.responses[0], draft.label, place)
    if len(draft.responses) == 2:
        return PairRecord(identifier, draft.prompt, draft.responses[0], draft.responses[1], place)
    return ResponseRecord(identifier, draft.prompt, draft.responses[0], place)
