"""Tokens, order and rows of the same data and seed are what they were when these hashes were stored.

The hashes were written by the version whose token cache was read whole by every rank; they may not change, or
a run would not resume where it was.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_hashes import hashes, make_module, write_sources

from nxdt_align.data import mismatched_parts, preparation, prepared, token_parts

STORED: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "stored_hashes.json").read_text())
MIXTURE = (
    "[{path: @/plain.jsonl, weight: 1.5}, {path: @/chats.jsonl, weight: 0.5}, "
    "{path: @/special.jsonl, weight: 2}]"
)
CASES = {
    "text": ("@/plain.jsonl", "dpo", "shared_prompt"),
    "packed": ("@/plain.jsonl", "orpo", "packed"),
    "none": ("@/special.jsonl", "dpo", "none"),
    "chats": ("@/chats.jsonl", "dpo", "shared_prompt"),
    "mixture": (MIXTURE, "dpo", "shared_prompt"),
    "kto": ("@/plain.jsonl", "kto", "packed"),
    "sft": (MIXTURE, "sft", "packed"),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_order_and_rows_stay(name: str, tmp_path: Path) -> None:
    """On 1, 2 and 4 ranks; the second and third read the tokens that the first cached."""
    write_sources(tmp_path)
    sources, objective, layout = CASES[name]
    for ranks in (1, 2, 4):
        module = make_module(
            tmp_path, sources, objective=objective, layout=layout, ranks=ranks, cache=tmp_path / "cache"
        )
        assert hashes(module) == STORED[f"{name} {ranks}"], ranks


@pytest.mark.parametrize("name", CASES)
def test_of_data_prepared_in_parts_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large data are, by several processes; found again without reading them, also from a cache that
    small data left."""
    monkeypatch.setattr(prepared, "LARGE", 0)
    monkeypatch.setattr(token_parts, "RECORDS", 23)
    write_sources(tmp_path)
    sources, objective, layout = CASES[name]
    for ranks in (1, 2, 4):
        module = make_module(
            tmp_path,
            sources,
            objective=objective,
            layout=layout,
            ranks=ranks,
            cache=tmp_path / "c" / "tokens",
        )
        assert hashes(module) == STORED[f"{name} {ranks}"], ranks
        for each in (token_parts, preparation, mismatched_parts):
            monkeypatch.setattr(each, "make_parts", None)
